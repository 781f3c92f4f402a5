"""Sentences for the mini corpus: a small seeded grammar of spoken commands, English and Mandarin.

The vocabulary is small, so that a small recogniser learns it in minutes; the word in a slot cannot be guessed from the
rest of the sentence.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np


def words(text: str) -> List[str]:
    """Split a string into words; a list of words is easier to read in the source as one string."""
    return text.split()


ENGLISH: Dict[str, List[str]] = {
    "put": words("put take bring find"),
    "bring": words("take bring"),
    "turn": words("turn switch"),
    "adjective": words("red green blue black yellow gold"),
    "thing": words("box fan table chair lamp window"),
    "room": words("kitchen bedroom garden office"),
    "device": words("light heater radio"),
    "name": words("Anna David Mary Harry"),
    "place": words("behind above under"),
    "digit": words("zero one two three four five six seven eight nine"),
}
ENGLISH_TEMPLATES = (
    "{put} the {adjective} {thing} {place} the {thing}",
    "{put} the {thing} and the {thing} in the {room}",
    "{turn} on the {adjective} {device} in the {room}",
    "{turn} off the {room} {device} and the {device}",
    "call {name} at {digit} {digit} {digit} {digit}",
    "{bring} the {adjective} {thing} to {name}",
    "set the {room} {device} to {digit} {digit}",
    "{bring} {thing} {digit} and {thing} {digit} to {name}",
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


def _mandarin_number(rng: np.random.Generator) -> str:
    ones = str(rng.choice(MANDARIN["digit"][1:]))
    return [ones, f"十{ones}", f"{ones}十", f"{ones}十{rng.choice(MANDARIN['digit'][1:])}"][int(rng.integers(4))]


def make_sentence(rng: np.random.Generator, language: str = "en") -> Tuple[str, str]:
    """Draw a sentence: (the text for the speech engine, the transcript).

    English transcripts are words of capitals with single blanks between them, Mandarin ones characters without blanks.
    """
    slots, templates = (MANDARIN, MANDARIN_TEMPLATES) if language == "cmn" else (ENGLISH, ENGLISH_TEMPLATES)
    template = templates[int(rng.integers(len(templates)))]
    spoken = ""
    rest = template
    # Slots are filled one by one: str.format would give every {digit} of a template the same value.
    while "{" in rest:
        before, _, rest = rest.partition("{")
        slot, _, rest = rest.partition("}")
        spoken += before + (_mandarin_number(rng) if slot == "number" else str(rng.choice(slots[slot])))
    spoken += rest
    if language == "cmn":
        return spoken, spoken
    return spoken, spoken.upper()
