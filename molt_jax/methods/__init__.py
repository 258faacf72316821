"""What is trained on the towers: MoLT and the systems that it is compared with."""
