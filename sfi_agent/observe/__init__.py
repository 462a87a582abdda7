"""What sessions let others see: traces and log events."""
