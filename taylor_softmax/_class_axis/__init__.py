"""Softmax over a finite axis of i.i.d. logits: the class axis of a network's last layer."""
