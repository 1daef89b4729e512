"""What tests share, a module a subject. Test modules import from here, never from each other."""
