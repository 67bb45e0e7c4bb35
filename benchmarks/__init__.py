"""Programs that measure speed and accuracy, print a table and save it."""
