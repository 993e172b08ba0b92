"""What the demo model is asked and how a conversation is laid out as text."""

SYSTEM = "You are a helpful assistant."
IMAGE_TOKEN_INDEX = -200
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

DESCRIBE = (
    "Describe this image.",
    "Describe the image in English.",
    "What is in this picture?",
    "Describe the image.",
    "What is in this image?",
    "What do you see?",
)
BRIEF = (
    "Describe the image in English. Output should be brief, about 15 words or less.",
    "Describe this image briefly.",
    "Give a short description of the image.",
)
READ = (
    "What is written in this image?",
    "What is written in this image? Output only the text in the image.",
    "Read the text.",
    "What is written?",
    "What does the text say?",
)
COUNT = ("How many shapes are there?", "How many shapes are in the image?", "Count the shapes.")
EXPRESSION = ("What is this person's facial expression? Output only one or two words.",)

NO_TEXT = "No text."
NO_PERSON = "No person."


def before_image() -> str:
    """The conversation up to the picture."""
    return f"{START}system\n{SYSTEM}{END}\n{START}user\n"


def after_image(prompt: str) -> str:
    """The conversation from the picture to where the answer starts."""
    return f"\n{prompt}{END}\n{START}assistant\n"
