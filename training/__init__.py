"""The parts of train.py: config, data, mesh, optimizer, step, checkpoint, metrics, evaluation."""
