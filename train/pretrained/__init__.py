"""Pretrained models: Hugging Face folders and GGUF files become runs, and runs become folders.

families.py         the families that can be read and written, as data, and their settings as the model's
fields.py           settings in a file, read with errors that name file, field, value and what was expected
weights.py          from a family's tensors to the model's parameters and back
hugging_face.py     folders of config.json, safetensors and tokenizer.json
gguf_file.py        GGUF files, of whichever quantisation
gguf_tokenizer.py   the tokenizer inside a GGUF file, as a tokenizers JSON file
chat_template.py    whether a model's chat template is the trainer's
run.py              what was read, as the folder of a run
export.py           the folder of a run, as a Hugging Face folder
"""
