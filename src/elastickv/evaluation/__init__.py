"""What a recipe costs a real model, through the real decode path; and the errors from which recipes are solved."""
