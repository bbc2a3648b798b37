"""Train a model in a folder, then load and use it.

In reading order:

- `pipeline`: `train`, from images to trained stages, pictures and figures.
- `job`: the training of both stages of a prepared run.
- `options`: device, checkpoints and display.
- `folder`: config.json, and whether a run can continue in a folder.
- `continuing`: a finished run that is trained for longer.
- `starting`: the weights of another run to start from.
- `timing`: stage lengths that fit a time budget.
- `build`: networks and balances from settings.
- `log`: metrics.jsonl.
- `callbacks`: your own code during training, TensorBoard and W&B.
- `validation`: the ELBO of held-out images, best weights, early stopping.
- `checkpoint`: checkpoints on disk.
- `plots`: training curves.
- `growth`: progress.png, drawn during training.
- `run`: `load`, and the trained model with all its methods.
- `evaluating`, `scores`, `classes`: parts of these methods: evaluation, scores of images, labels.
- `export`: samples and codes as files.
- `sharing`: runs on the Hugging Face Hub.
- `parts`, `onnx_files`: networks as ONNX files.
- `checkup`: `poise doctor`.
"""
