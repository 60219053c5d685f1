#!/bin/sh
# From training to the published row of a full-size VAE. A person with a GPU and a Hub account runs it once:
#
#     hf auth login
#     sh experiments/release.sh --dry_run     # checks every step; trains, measures and publishes nothing
#     sh experiments/release.sh
#
# It can be repeated: training and evaluations continue where they were. Variables can also be set before the command.
set -eu

HUB_ID=${HUB_ID:-user/srl-sd-vae}
LINK=${LINK:-https://huggingface.co/$HUB_ID}
BASE=${BASE:-stabilityai/sd-vae-ft-mse}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/srl-sd-vae}
PROTOCOL=${PROTOCOL:-full}
ZOO=${ZOO:-zoo}
DATA=${DATA:-COCO}
BUDGET=${BUDGET:-8/255}
LAUNCH=${LAUNCH:-accelerate launch --mixed_precision bf16}
TRAINING=${TRAINING:---dataset_name detection-datasets/coco --streaming --validation_split val --resolution 256 --random_flip
    --train_batch_size 8 --gradient_accumulation_steps 4 --max_train_steps 5000 --pgd_steps 10 --pgd_step_size 0.02
    --lpips_weight 1.0 --originality_weight 0.01 --learning_rate 1e-5}
EVALUATION=${EVALUATION:---dataset_name detection-datasets/coco --streaming --split val --resolution 256 --num_images 64
    --attacks quick --metrics psnr ssim drift}

cd "$(dirname "$0")/.."
case ${1-} in
    '' | --dry_run) DRY_RUN=${1-} ;;
    *)
        echo "error: $1 is not known; the only flag is --dry_run" >&2
        exit 2
        ;;
esac

step() {
    printf '\n== %s\n' "$1"
}

step "1 of 6: check the login and the repository, and write the entry"
python -m experiments.hub_access "$HUB_ID"

if [ -n "$DRY_RUN" ]; then
    # The base stands for what a training would leave and a push would publish: it has the same shape.
    TRAINED=$OUTPUT_DIR-dry-run/$(basename "$HUB_ID")
    PUBLISHED=$TRAINED
    [ -e "$TRAINED" ] || python -m srl_utils.hub convert "$BASE" "$TRAINED"
else
    TRAINED=$OUTPUT_DIR
    PUBLISHED=$HUB_ID
fi
ENTRY=$(python -m experiments.release_entry "$OUTPUT_DIR" --weights "$PUBLISHED" --base "$BASE" --protocol "$PROTOCOL" \
    --data "$DATA" --budget "$BUDGET" --link "$LINK")
NAME=$(basename "$ENTRY" .yaml)
MEASURED=$OUTPUT_DIR/zoo

# The lists of flags in $LAUNCH, $TRAINING and $EVALUATION are split at spaces on purpose.
step "2 of 6: train"
$LAUNCH train_srl_vae.py --pretrained_model_name_or_path "$BASE" $TRAINING --epsilon "$BUDGET" \
    --output_dir "$OUTPUT_DIR" --resume_from_checkpoint latest $DRY_RUN

step "3 of 6: evaluate"
python -m srl_utils.evaluation reconstruction --baseline "$BASE" --vae "robust=$TRAINED" $EVALUATION --epsilons "$BUDGET" \
    --output_dir "$OUTPUT_DIR/evaluation" $DRY_RUN

step "4 of 6: check the model card that the training has written, and push"
python -m srl_utils.hub push "$TRAINED" --repo_id "$HUB_ID" $DRY_RUN

step "5 of 6: measure the published weights by the protocol of the zoo"
python -m srl_utils.zoo evaluate "$PUBLISHED" --zoo "$ZOO" --base "$BASE" --protocol "$PROTOCOL" \
    --output_dir "$MEASURED" $DRY_RUN

step "6 of 6: submit"
python -m srl_utils.zoo submit "$ENTRY" "$MEASURED/$NAME/row.json" --zoo "$ZOO" $DRY_RUN
[ -n "$DRY_RUN" ] || python -m srl_utils.zoo leaderboard --zoo "$ZOO"
