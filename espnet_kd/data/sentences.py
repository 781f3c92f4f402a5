"""Sentences for the mini corpus: a small seeded grammar of spoken commands, English and Mandarin.

The words are chosen to be confusable (fifteen and fifty, pan and fan, B and D), so that a small recogniser errs and
cannot win by guessing from the sentence alone.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np


def words(text: str) -> List[str]:
    """Cut a list of words, as it is easiest read in the source."""
    return text.split()


ENGLISH: Dict[str, List[str]] = {
    "put": words("put keep take bring find"),
    "turn": words("turn switch"),
    "adjective": words("red green grey blue cold gold small tall thin dark light white"),
    "thing": words("pan fan bell ball desk disk boat coat lamp lamb plate plane key tea clock block"),
    "room": words("kitchen bedroom hall garden office cellar"),
    "device": words("light heater fan timer radio oven"),
    "name": words("Ann Dan Ben Ken Jim Kim James Jane Mark Mary Harry Larry"),
    "place": words("behind beside above below"),
    "unit": words("seconds minutes hours degrees"),
    "digit": words("zero one two three four five six seven eight nine"),
    "letter": words("B C D E F G H J K L M N O P Q R S T U V W X Y Z"),  # A alone would be spoken as the article
    "teen": words("eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"),
    "ten": words("twenty thirty forty fifty sixty seventy eighty ninety"),
    "street": words("oak lake hill mill main park"),
    "say": words("say spell enter erase"),
    "opening": ["", "", "please", "don't", "let's"],
}
ENGLISH_TEMPLATES = (
    "{opening} {put} the {adjective} {thing} {place} the {thing}",
    "{put} the {thing} and the {thing} in the {room}",
    "{turn} on the {room} {device}",
    "{turn} off the {adjective} {device} in the {room}",
    "set the {room} {device} to {number} {unit}",
    "what's the {thing} {place} the {adjective} {thing}",
    "call {name} at {digit} {digit} {digit} {digit}",
    "{say} {letter} {letter} {letter} {digit}",
    "{say} {letter} {digit} {letter} {letter}",
    "{say} {name} {letter} {number}",
    "{name} didn't {put} the {adjective} {thing}",
    "ask {name} or {name} for {number} {thing} {thing}",
    "go to {number} {street} street",
    "it's {number} {unit} to {street} {street}",
    "{name} and {name} {put} {number} {adjective} {thing}",
)
MANDARIN: Dict[str, List[str]] = {
    "turn": words("打开 关上 关掉 调高 调低"),
    "room": words("客厅 厨房 卧室 书房 车库 花园"),
    "device": words("灯 空调 电视 音乐 窗户 门 电脑 风扇"),
    "name": words("王明 李华 张伟 刘洋 陈静 杨红 小李 小王 老张"),
    "digit": words("零 一 二 三 四 五 六 七 八 九"),
    "unit": words("度 分钟 小时 秒 天"),
    "time": words("今天 明天 昨天 早上 下午 晚上"),
    "place": words("北京 上海 南京 广州 天津 西安 山西 山东"),
    "verb": words("去 来 到 在"),
    "thing": words("书 水 茶 花 鱼 米 衣服 苹果 钱 票 饭"),
    "buy": words("买 卖 要 找 拿 送"),
}
MANDARIN_TEMPLATES = (
    "{turn}{room}的{device}",
    "把{room}的{device}{turn}",
    "把{device}调到{number}{unit}",
    "给{name}打电话",
    "{time}{name}{verb}{place}",
    "{name}{time}{buy}{number}个{thing}",
    "号码是{digit}{digit}{digit}{digit}{digit}",
    "{time}{number}点{verb}{place}{buy}{thing}",
    "我{buy}{thing}和{thing}",
)


def _english_number(rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    pick = lambda key: str(rng.choice(ENGLISH[key]))  # noqa: E731
    if kind == 0:
        return pick("digit")
    if kind == 1:
        return pick("teen")
    if kind == 2:
        return pick("ten")
    return f"{pick('ten')} {rng.choice(ENGLISH['digit'][1:])}"


def _mandarin_number(rng: np.random.Generator) -> str:
    ones = str(rng.choice(MANDARIN["digit"][1:]))
    return [ones, f"十{ones}", f"{ones}十", f"{ones}十{rng.choice(MANDARIN['digit'][1:])}"][int(rng.integers(4))]


def make_sentence(rng: np.random.Generator, language: str = "en") -> Tuple[str, str]:
    """Draw a sentence: (what the engine is to speak, the transcript).

    English transcripts are capitals, apostrophes and single blanks; single letters are names of letters. Mandarin
    transcripts are characters without blanks.
    """
    slots, templates, number = (
        (MANDARIN, MANDARIN_TEMPLATES, _mandarin_number)
        if language == "cmn"
        else (ENGLISH, ENGLISH_TEMPLATES, _english_number)
    )
    template = templates[int(rng.integers(len(templates)))]
    spoken = ""
    rest = template
    # Slots are filled one by one: str.format would give every {letter} of a template the same value.
    while "{" in rest:
        before, _, rest = rest.partition("{")
        slot, _, rest = rest.partition("}")
        spoken += before + (number(rng) if slot == "number" else str(rng.choice(slots[slot])))
    spoken += rest
    if language == "cmn":
        return spoken, spoken
    spoken = " ".join(spoken.split())
    return spoken, spoken.upper()
