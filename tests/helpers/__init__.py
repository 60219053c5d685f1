"""What several tests need: small networks, odd pictures, a Hub of their own."""
