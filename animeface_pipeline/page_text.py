"""What the page says, in the languages that it speaks: the labels by the browser's language, the messages too."""

ENGLISH = {
    "intro": "Faces that a network draws by denoising. Choose a seed, draw, and pick one of the faces to go on with.",
    "seed": "Seed",
    "dice": "Another seed",
    "solver": "Solver",
    "steps": "Steps",
    "count": "How many faces",
    "count_info": "The next one has the next seed.",
    "draw": "Draw",
    "mix": "Mix",
    "redo": "Repaint",
    "edit": "Edit",
    "upload": "Upload a picture",
    "mix_help": "Two faces and what lies between them. Solver: always DDIM, which finds a picture's noise as well.",
    "face_a": "From",
    "face_b": "To",
    "frames": "Pictures on the way",
    "redo_help": "What you paint is drawn anew so that it fits the rest; every other pixel stays as it is.",
    "canvas": "Paint here",
    "area": "Or without a mouse, this area",
    "passes": "Passes",
    "passes_info": "More passes fit better and take longer.",
    "edit_help": "A sketch, a photo or another face becomes a face that looks like it.",
    "edited": "Start from",
    "strength": "Strength",
    "strength_info": "How much may change.",
    "stage": "Stage",
    "stage_info": "Move it to see how the picture came about.",
    "stages": "The picture as it comes about",
    "faces": "Faces: pick one",
    "save_face": "⬇ Picked face",
    "save_strip": "⬇ Strip",
    "save_film": "⬇ Animation",
    "to_a": "→ Mix, from",
    "to_b": "→ Mix, to",
    "to_redo": "→ Repaint",
    "to_edit": "→ Edit",
    "credits": "Settings and seed are in the PNG files. Nothing that you upload is kept.",
}

CHINESE = {
    "intro": "神经网络从噪声中一步步画出的动漫头像。选一个种子，开始绘制，再挑一张继续玩。",
    "seed": "种子",
    "dice": "换一个种子",
    "solver": "求解器",
    "steps": "步数",
    "count": "张数",
    "count_info": "后一张的种子加一。",
    "draw": "绘制",
    "mix": "混合",
    "redo": "局部重画",
    "edit": "编辑图片",
    "upload": "上传图片",
    "mix_help": "两张头像以及它们之间的过渡。求解器固定为 DDIM，它也能求出一张图片对应的噪声。",
    "face_a": "起点",
    "face_b": "终点",
    "frames": "途中的图片数",
    "redo_help": "涂抹的部分会重新绘制并与其余部分衔接；其他像素保持不变。",
    "canvas": "在此涂抹",
    "area": "不用鼠标时，重画这一区域",
    "passes": "遍数",
    "passes_info": "遍数越多衔接越好，也越慢。",
    "edit_help": "把草图、照片或另一张头像变成与之相像的头像。",
    "edited": "原图",
    "strength": "强度",
    "strength_info": "允许改变的程度。",
    "stage": "阶段",
    "stage_info": "拖动以查看图片的形成过程。",
    "stages": "图片的形成过程",
    "faces": "头像：点选一张",
    "save_face": "⬇ 选中的头像",
    "save_strip": "⬇ 过程长图",
    "save_film": "⬇ 动画",
    "to_a": "→ 混合的起点",
    "to_b": "→ 混合的终点",
    "to_redo": "→ 局部重画",
    "to_edit": "→ 编辑",
    "credits": "PNG 文件中带有设置和种子。上传的图片不会被保留。",
}

# Gradio's own name of a language → its texts.
TEXTS = {"en": ENGLISH, "zh-CN": CHINESE}

# The parts of a picture that can be redrawn without painting: name → (left, top, right, bottom) in shares of its size.
AREAS = {
    "painted 涂抹的部分": None,
    "upper half 上半": (0.0, 0.0, 1.0, 0.5),
    "lower half 下半": (0.0, 0.5, 1.0, 1.0),
    "left half 左半": (0.0, 0.0, 0.5, 1.0),
    "right half 右半": (0.5, 0.0, 1.0, 1.0),
    "middle 中间": (0.25, 0.25, 0.75, 0.75),
}

# Message → (English, Chinese).
MESSAGES = {
    "unreadable": ("The upload cannot be read; try again.", "无法读取上传的文件，请重试。"),
    "not-an-image": (
        "This file is no picture: upload a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF.",
        "这个文件不是图片：请上传 PNG、JPEG、WebP、GIF、BMP、TIFF 或 AVIF。",
    ),
    "corrupt": ("This picture is damaged: save it again and upload that.", "图片已损坏：请重新保存后再上传。"),
    "too-many-pixels": (
        "This picture has more than {pixels} pixels: make it smaller.",
        "图片超过 {pixels} 像素：请先缩小。",
    ),
    "nothing-picked": ("No face is picked yet: draw some first.", "还没有选中的头像：请先绘制。"),
    "two-faces": ("Mixing needs two faces: choose both.", "混合需要两张头像：请把两张都选好。"),
    "no-picture": (
        "Choose a picture first: upload one or take a picked face.",
        "请先选择图片：上传，或用选中的头像。",
    ),
    "nothing-painted": (
        "Nothing is painted: paint over a part, or choose an area.",
        "还没有涂抹：请涂抹或选择一个区域。",
    ),
    "bad-seed": ("The seed must be a whole number from 0 to {most}.", "种子必须是 0 到 {most} 之间的整数。"),
    "not-finite": (
        "The network's output is not finite: choose another solver.",
        "网络输出不是有限数：请换一个求解器。",
    ),
    "refused": ("This does not work: {error}", "无法完成：{error}"),
}


def message(key: str, accept_language: str | None, **values: object) -> str:
    """A message in the language of a request's `Accept-Language`."""
    english, chinese = MESSAGES[key]
    return (chinese if (accept_language or "").lower().startswith("zh") else english).format(**values)
