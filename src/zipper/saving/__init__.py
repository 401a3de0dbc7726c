"""What lies on disk and on the hub: files of strangers, a zip's folder, repositories, the model
card."""
