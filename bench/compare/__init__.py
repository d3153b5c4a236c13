"""Methods, kinds of text and recovery compared at equal size on a real pretrained model."""
