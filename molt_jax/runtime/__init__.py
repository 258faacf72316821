"""What every command runs on: messages, files, processes, devices."""
