"""What is written to disk and how stock tools read it. The only package that writes files."""
