"""What scrubbing finds of planted personal data, and what it mistakes for some.

    python -m benchmarks.scrub [--rows 300] [--seed 0] [--json]

In: nothing. Sentences of chat prompts, English and Chinese, with persons made up by Faker (seeded) in their gaps;
beside them tasks of reasoning-gym and sentences full of numbers, theorems and places, which hold nothing personal.
Out: by kind and language, the share of planted texts that no character is left of (recall), the share of findings that
touch one (precision); findings in texts without any; characters read a second. Takes about half a minute.
"""

import argparse
import json
import random
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from faker import Faker

from teacher_cache.scrub.config import KINDS, ScrubConfig
from teacher_cache.scrub.recognisers import Finding, Recognisers

ENGLISH = {
    "person": [
        "My name is {}, please help me with a cover letter.",
        "{} sold clips to 48 friends in April. How many did {} sell in May?",
        "Summarise this mail from {} to the finance team.",
        "Patient {}, aged 45, was admitted with chest pain.",
        "I have a meeting with {} and two of her colleagues on Monday.",
        "Dear {},\nthank you for your order.",
        "Translate into French: {} is my landlord.",
    ],
    "email": ["Write to {} about the invoice.", "My address is {}, reply there.", "Contact: {}\nSubject: rent"],
    "phone": [
        "Call me at {} after six.",
        "Phone: {}",
        "Her number is {}, text her.",
        "You can reach us on {} or by mail.",
    ],
    "id": ["My SSN is {}, is that form right?", "Social security number: {}", "Applicant, SSN {}, born in 1970."],
    "bank": ["Charge my card {} for it.", "The transfer goes to {}.", "Visa {} was declined, why?"],
    "address": ["Ship it to {} before Friday.", "I live at {}.", "Our office: {}. How do I get there by train?"],
}
CHINESE = {
    "person": [
        "我叫{}，请帮我写一封求职信。",
        "{}有5个苹果，给了同学2个，还剩几个？",
        "请给{}写一封关于周一会议的邮件。",
        "患者{}，男，45岁，因胸痛入院。",
        "联系人：{}，请尽快回复。",
        "尊敬的{}先生：感谢您的订单。",
    ],
    "email": ["邮箱{}联系我。", "请发到{}，谢谢", "联系方式：{}"],
    "phone": ["手机{}，请回电。", "电话：{}", "我的号码是{}，微信同号。", "请拨打{}咨询"],
    "id": ["身份证号{}，请核对。", "身份证号码：{}", "证件{}有效吗？"],
    "bank": ["银行卡号{}，请转账。", "转到卡{}里"],
    "address": ["我住在{}，怎么去机场？", "收货地址：{}", "请寄到{}，谢谢。"],
}
CLEAN = [
    "By Vieta's formulas and Euler's theorem the sum of the roots is {n}.",
    "Compute {n} * {m} and reduce the result modulo {p}.",
    "The distance from Paris to Berlin is {s} km; a train needs {s} minutes.",
    "Sort the list [{p}, {m}, {n}] and return its median.",
    "def solve(n: int) -> int:\n    return n % {p} + {m}",
    "Let ABC be a triangle with AB = {s}, BC = {s} and CA = {s}. Find its area.",
    "In 1969 the Apollo 11 mission carried {s} kg of rock from the Moon to Houston.",
    "Python 3.12.{s} was released after version 3.11; pip install numpy=={s}.0.1",
    "What is the capital of Jordan, and which river crosses Washington?",
    "Wait, so 2^10 = 1024. Hmm, let me check again: {n} / {p} is about {s}.5.",
    "根据韦达定理和勾股定理，三角形ABC的面积是{s}。",
    "计算{n}乘以{m}，再对{p}取余。",
    "北京到上海的高铁全程{s}公里，需要{s}分钟。",
    "设函数f(x)=x^2+{s}x，求它在区间[0, {s}]上的最大值。",
    "好的，我们来计算高斯积分，首先令x={s}。",
    "Okay, so I need to find the area. First, recall Heron's formula. But wait, is the angle obtuse? Let's check {s}.",
    "Alternatively, use the Cauchy-Schwarz inequality. Therefore, the answer is \\boxed{{{s}}}. Done!",
    "Mr. and Mrs. are titles. The May report says that Will and Grace ran for eight seasons in the United States.",
    "小区门口到学校有{s}米，他每分钟走{s}米，要走几分钟？",
]
TASKS = (
    "chain_sum",
    "simple_equations",
    "prime_factorization",
    "base_conversion",
    "number_sorting",
    "bitwise_arithmetic",
)

# Cities with districts of theirs: Faker's Chinese addresses name places that do not exist.
DISTRICTS = {
    "北京市": ["朝阳区", "海淀区", "丰台区"], "上海市": ["浦东新区", "徐汇区", "静安区"],
    "广东省深圳市": ["南山区", "福田区"], "浙江省杭州市": ["西湖区", "余杭区"], "四川省成都市": ["武侯区", "锦江区"],
    "江苏省南京市": ["鼓楼区", "玄武区"], "湖北省武汉市": ["洪山区", "江汉区"], "陕西省西安市": ["雁塔区", "碑林区"],
}  # fmt: skip
ROADS = [
    "建国路",
    "中山路",
    "人民南路",
    "科技园南路",
    "文一西路",
    "解放大道",
    "长安街",
    "和平里西街",
    "天府三街",
    "学院路",
]
DOUBLE_SURNAMES = ["欧阳", "司马", "上官", "诸葛", "皇甫"]


@dataclass(frozen=True, slots=True)
class Planted:
    """A text and the characters of it that are personal data; `group` is the line of the table."""

    group: str
    text: str
    spans: list[tuple[int, int]]


class Persons:
    """Makes up what goes into the gaps."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._english, self._british, self._chinese = Faker("en_US"), Faker("en_GB"), Faker("zh_CN")
        for one in (self._english, self._british, self._chinese):
            one.seed_instance(seed)

    def of(self, language: str, kind: str) -> str:
        return str(getattr(self, f"_{language}_{kind}")())

    def _one(self, *makers: Callable[[], str]) -> str:
        return self._draw.choice(makers)()

    def _digits(self, pattern: str) -> str:
        return re.sub("#", lambda _: str(self._draw.randrange(10)), pattern)

    def _luhn(self, pattern: str) -> str:
        number = self._digits(pattern)
        return next(text for digit in string.digits if _luhn_sum(text := number[:-1] + digit) % 10 == 0)

    def _en_person(self) -> str:
        made, british = self._english, self._british
        return self._one(
            lambda: f"{made.first_name()} {made.last_name()}",
            lambda: f"{british.first_name()} {british.last_name()}",
            made.first_name,
        )

    def _en_email(self) -> str:
        return self._one(self._english.email, self._english.company_email, self._british.email)

    def _en_phone(self) -> str:
        # Area codes that exist: 555-01xx is for fiction, and no phone number.
        area = self._draw.choice(["212", "415", "312", "617", "713"])
        return self._digits(
            self._draw.choice(
                [
                    f"({area}) 23#-####",
                    f"{area}-34#-####",
                    f"+1 {area} 45# ####",
                    f"{area}.56#.####",
                    "+44 20 7946 0###",
                ]
            )
        )

    def _en_id(self) -> str:
        return self._one(self._english.ssn)

    def _en_bank(self) -> str:
        return self._one(
            self._english.credit_card_number, self._british.iban, lambda: self._luhn("4### #### #### ####")
        )

    def _en_address(self) -> str:
        made = self._english
        return self._one(
            lambda: (
                f"{made.street_address()}, {made.city()}, {made.state_abbr(include_territories=False)} {made.zipcode()}"
            ),
            lambda: f"{made.street_address()}, {made.city()}, {made.state()}",
            lambda: f"{made.building_number()} {made.street_name()}",
            lambda: f"{self._british.street_address()}, {self._british.city()} {self._british.postcode()}".replace(
                "\n", ", "
            ),
        )

    def _zh_person(self) -> str:
        given = self._chinese.first_name()
        return self._one(self._chinese.name, self._chinese.name, lambda: self._draw.choice(DOUBLE_SURNAMES) + given)

    def _zh_email(self) -> str:
        return self._one(self._chinese.email, lambda: self._digits("########@qq.com"))

    def _zh_phone(self) -> str:
        mobile = self._chinese.phone_number()
        return self._draw.choice(
            [mobile, f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}", f"+86 {mobile}", self._digits("010-8###-####"),
             f"{mobile[:3]} {mobile[3:7]} {mobile[7:]}"]
        )  # fmt: skip

    def _zh_id(self) -> str:
        return str(self._chinese.ssn())

    def _zh_bank(self) -> str:
        return self._one(lambda: self._luhn("6222021############"), lambda: self._luhn("6217 00## #### ####"))

    def _zh_address(self) -> str:
        city = self._draw.choice(list(DISTRICTS))
        road = self._digits(f"{self._draw.choice(ROADS)}1##号")
        place = f"{city}{self._draw.choice(DISTRICTS[city])}{road}"
        return place + self._digits(
            self._draw.choice(["", "3号楼2单元1#0#室", "A座12#室", "院5号楼80#", "幸福小区6栋30#室"])
        )


def planted(rows: int, seed: int) -> Iterator[Planted]:
    """`rows` texts of each kind and language."""
    persons, draw = Persons(seed), random.Random(seed)
    for language, templates in (("en", ENGLISH), ("zh", CHINESE)):
        for kind in KINDS:
            for _ in range(rows):
                parts = draw.choice(templates[kind]).split("{}")
                value = persons.of(language, kind)
                yield _filled(f"{kind} {language}", parts, value)
    for _ in range(rows):
        parts = draw.choice(ENGLISH["person"]).split("{}")
        yield _filled("person en, lower case", [one.lower() for one in parts], persons.of("en", "person").lower())


def clean(rows: int, seed: int) -> list[str]:
    """Texts without personal data."""
    import reasoning_gym

    draw = random.Random(seed)
    sentences = [
        draw.choice(CLEAN).format(n=draw.randrange(10**9, 10**13), m=draw.randrange(10**6, 10**10),
                                  p=draw.randrange(1000, 10**5), s=draw.randrange(2, 99))
        for _ in range(rows)
    ]  # fmt: skip
    tasks = [
        entry["question"]
        for task in TASKS
        for entry in reasoning_gym.create_dataset(task, size=rows // len(TASKS), seed=seed)
    ]
    return [*sentences, *tasks]


def measure(recognisers: Recognisers, texts: Sequence[Planted], clean_texts: Sequence[str]) -> dict[str, Any]:
    """Recall and precision by group, findings in clean texts by kind, and speed."""
    started_s = time.process_time()
    found = recognisers.find([one.text for one in texts], KINDS)
    false = recognisers.find(clean_texts, KINDS)
    seconds = time.process_time() - started_s
    groups: dict[str, dict[str, Any]] = {}
    for one, own in zip(texts, found, strict=True):
        group = groups.setdefault(one.group, {"planted": 0, "gone": 0, "of_its_kind": 0, "findings": 0, "right": 0})
        kind = one.group.split()[0]
        group["planted"] += len(one.spans)
        group["gone"] += sum(_covers(own, *span) for span in one.spans)
        group["of_its_kind"] += sum(_covers([f for f in own if f.kind == kind], *span) for span in one.spans)
        group["findings"] += len(own)
        group["right"] += sum(any(f.start < stop and start < f.stop for start, stop in one.spans) for f in own)
    counted: dict[str, int] = dict.fromkeys(KINDS, 0)
    for finding in (finding for own in false for finding in own):
        counted[finding.kind] += 1
    num_chars = sum(map(len, (*(one.text for one in texts), *clean_texts)))
    return {
        "groups": groups,
        "clean_texts": len(clean_texts),
        "clean_texts_with_findings": sum(bool(own) for own in false),
        "findings_in_clean_texts": counted,
        "chars_per_s": num_chars / seconds,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| planted | texts | recall | with the right kind | precision |", "|---|---|---|---|---|"]
    for name, one in result["groups"].items():
        precision = one["right"] / one["findings"] if one["findings"] else float("nan")
        lines.append(
            f"| {name} | {one['planted']} | {one['gone'] / one['planted']:.3f} | "
            f"{one['of_its_kind'] / one['planted']:.3f} | {precision:.3f} |"
        )
    num = result["clean_texts_with_findings"]
    false = ", ".join(f"{kind} {num}" for kind, num in result["findings_in_clean_texts"].items() if num)
    lines += [
        "",
        f"Clean texts: {num} of {result['clean_texts']} have findings ({false or 'none'}).",
        f"{result['chars_per_s']:,.0f} characters a CPU second, models loaded in {result['load_s']:.1f} CPU s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=300, help="texts of each kind and language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--misses", type=int, default=0, help="missed texts to show per group")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    started_s = time.process_time()
    recognisers = Recognisers(ScrubConfig())
    load_s = time.process_time() - started_s
    texts, clean_texts = [*planted(arguments.rows, arguments.seed)], clean(arguments.rows, arguments.seed)
    result = measure(recognisers, texts, clean_texts) | {"load_s": load_s}
    if arguments.misses:
        _show_misses(recognisers, texts, clean_texts, arguments.misses)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


def _filled(group: str, parts: Sequence[str], value: str) -> Planted:
    text, spans = parts[0], []
    for part in parts[1:]:
        spans.append((len(text), len(text) + len(value)))
        text += value + part
    return Planted(group, text, spans)


def _covers(findings: Iterable[Finding], start: int, stop: int) -> bool:
    left = {*range(start, stop)}
    for one in findings:
        left -= {*range(one.start, one.stop)}
    return not left


def _luhn_sum(number: str) -> int:
    digits = [int(one) for one in reversed(number) if one.isdigit()]
    return sum(digits[::2]) + sum(sum(divmod(2 * one, 10)) for one in digits[1::2])


def _show_misses(recognisers: Recognisers, texts: Sequence[Planted], clean_texts: Sequence[str], num: int) -> None:
    shown: dict[str, int] = {}
    found = recognisers.find([one.text for one in texts], KINDS)
    for one, own in zip(texts, found, strict=True):
        if not all(_covers(own, *span) for span in one.spans) and shown.setdefault(one.group, 0) < num:
            shown[one.group] += 1
            print(one.group, repr(one.text), [(f.kind, one.text[f.start : f.stop]) for f in own])
    for text, own in zip(clean_texts, recognisers.find(clean_texts, KINDS), strict=True):
        if own and shown.setdefault("clean", 0) < 3 * num:
            shown["clean"] += 1
            print("clean", repr(text), [(f.kind, text[f.start : f.stop]) for f in own])


if __name__ == "__main__":
    main()
