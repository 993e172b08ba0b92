"""The strings and conversations whose tokenization is kept in tests/golden/tokenization.json."""

import unicodedata

_ACCENTS = "Crème brûlée, naïve Ångström, Việt Nam"

STRINGS: tuple[str, ...] = (
    "",
    "a",
    "Describe this image.",
    "What is written on the sign?",
    "The quick brown fox jumps over the lazy dog.",
    "don't can't we've I'll she'd they're it's I'm",
    "DON'T CAN'T WE'VE I'LL SHE'D THEY'RE IT'S",
    "don\u2019t use typographic apostrophes",
    "0 1 12 123 1234 12345 3.14159 1,000,000",
    "2024-05-17T08:30:00Z v1.2.3-rc4",
    "١٢٣ ४५६ Ⅷ ½ ²",
    " leading",
    "trailing ",
    "two  spaces   three    four",
    "\ttab\t\ttabs",
    "line\nline\n\nline\r\nline\r\r\n",
    "   \n   \n",
    "\n\n\n",
    "     ",
    "a\u00a0b\u2003c\u3000d",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))  # 3\n",
    '{"key": [1, 2, {"nested": null}]}',
    "<p>Hello &amp; <b>world</b></p>",
    "https://example.org/a/b?c=d&e=f#g",
    "!!! ??? ... --- *** ((())) [[]] {{}}",
    "snake_case camelCase kebab-case UPPER",
    "Ein Bild zeigt eine Straße über dem Fluß.",
    "¿Dónde está el niño? ¡Aquí!",
    "Описание изображения на русском языке.",
    "图片中有一只猫。这是什么?",
    "画像を説明してください。",
    "이미지를 설명하세요.",
    "صف هذه الصورة من فضلك",
    "תאר את התמונה",
    "इस चित्र का वर्णन करें।",
    "อธิบายภาพนี้",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🇨🇭 ❤️",
    "x² + y² = z² ∑ ∫ √ ≤ ≠ →",
    unicodedata.normalize("NFC", _ACCENTS),
    unicodedata.normalize("NFD", _ACCENTS),
    unicodedata.normalize("NFD", "각 한국어"),
    "ﬁne ﬂow Å Å Å",
    "<|im_start|>user\nHello<|im_end|>\n",
    "before<|endoftext|>after",
    "<|im_start|><|im_start|><|im_end|>",
    " <|im_end|> spaces around <|im_start|> ",
    "<|im_start |> not special <|im_sep|> <|IM_END|>",
    "literal <image> in text",
    "null\x00byte \x7f \ufeff \ufffd",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀",
)

Message = dict[str, str]

CONVERSATIONS: dict[str, list[Message]] = {
    "one_image": [{"role": "user", "content": "<image>\nDescribe this image."}],
    "text_only": [{"role": "user", "content": "What is in the picture?"}],
    "two_images": [{"role": "user", "content": "<image>\n<image>\nWhat is in the picture?"}],
    "system": [
        {"role": "system", "content": "Read the text aloud."},
        {"role": "user", "content": "<image>\nWhat is written?"},
    ],
    "second_turn": [
        {"role": "user", "content": "<image>\nDescribe the image."},
        {"role": "assistant", "content": "A red square."},
        {"role": "user", "content": "Is it blue?"},
    ],
}
