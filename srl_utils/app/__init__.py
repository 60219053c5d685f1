"""A page in the browser: clean images, attack and compare VAEs, edit protected images, look at results."""
