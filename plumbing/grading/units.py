r"""A quantity as its number and its unit: 5 N·m, 9.8 m s^{-2}, 5 平方厘米, 5 apples.

Only what is known here is a unit. Other words are forgiven behind a number only where they count
things, in the plural: a policy learns what is forgiven.
"""

import re

PREFIXES = {"k": "kilo", "M": "mega", "G": "giga", "d": "deci", "c": "centi", "m": "milli"}
PREFIXES |= {"": "", "µ": "micro", "n": "nano", "p": "pico"}
# Units that take these prefixes, with their names. Symbols mind the case: 3 MW is not 3 mW.
METRIC = (
    "m meter metre; g gram gramme; s second sec; L liter litre; N newton; J joule; W watt;"
    "Pa pascal; V volt; A ampere amp; K kelvin; Omega ohm; F farad; C coulomb; Hz hertz; T tesla;"
    "mol mole; eV electronvolt"
)
OTHERS = (
    "% %; degree deg degree 度; celsius celsius degreec 摄氏度; fahrenheit fahrenheit degreef;"
    "rad rad radian 弧度; in in inch inche; ft ft foot feet; yd yd yard; mi mi mile; gal gallon;"
    "lb lb pound; oz oz ounce; t ton tonne 吨; min min minute 分钟 分; h h hr hour 小时 时;"
    "day day 天 日; week week 周; month month 月; year yr year 年 岁;"
    "dollar dollar usd 美元; euro euro eur 欧元; yuan yuan rmb cny 元; gbp gbp; cent cent;"
    "m 米; km km 千米 公里; dm 分米; cm cm 厘米; mm mm 毫米; kg kg 千克 公斤; g 克; mg mg;"
    "L l 升; mL ml 毫升; s 秒; N 牛顿 牛; J 焦耳 焦; W 瓦; V 伏; A 安; Omega 欧姆 欧;"
    "kOmega kilohm; Hz hz; unit unit; acre acre;"
    "个 个 只 条 人 名 张 本 次 种 件 块 支 根 颗 辆 头 棵 道 位 台 盒 箱"
)
UNITS = {name: row.split()[0] for row in OTHERS.split(";") for name in row.split()[1:]}
SYMBOLS = set()
for symbol, *names in map(str.split, METRIC.split(";")):
    SYMBOLS |= {prefix + symbol for prefix in PREFIXES} - {"pm"}  # 5:30 pm
    UNITS |= {word + name: prefix + symbol for prefix, word in PREFIXES.items() for name in names}

SPELLINGS = [
    (r"\bmu ?(?=[A-Za-z])", "µ"),
    (r"\b([kMm]) (?=Omega)", r"\1"),
    (r"(?i)\bdegrees? ?(c|f)(?:elsius|ahrenheit)?(?![a-z])", r"degree\1"),
    (r"\b(?:mph|kph|kmh|kWh|Nm|Ah)\b", lambda m: SHORT[m[0]]),
    (r" ?(?:\bper\b|每) ?", "/"),
    (r"/ ?\(([^()]*)\)$", r"/\1"),  # J/(kg*K)
    (r"(?:\b(?:square|sq) |平方)([A-Za-z]+|[一-龥]+)", r"\1^2"),
    (r"(?:\bcubic |立方)([A-Za-z]+|[一-龥]+)", r"\1^3"),
    (r" (squared|cubed)\b", lambda m: "^2" if m[1] == "squared" else "^3"),
]
SHORT = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kWh": "kW*h", "Nm": "N*m", "Ah": "A*h"}
FACTOR = r" *([*/]?) *(µ?[A-Za-z]++|[一-龥]++|%)(?:\^\(?(-?\d)\)?)?"
PLACES = re.compile(r"(?<=[\d)!])(?![\d.,)!])|(?<=pi)(?![a-z])")
NEAR = set("mm cm dm km kg mg ml in ft yd mi lb oz hr yr".split())  # may touch their number
# Words that make another number of the one before them.
CHANGES = re.compile(
    r"\b(?:pairs?|dozens?|scores?|gross|tens|hundreds?|thousands?|\w*illions?|lakhs?|crores?"
    r"|half|halves|halfs|thirds|quarters|\w*ths|minus|plus|less|more|over|under|above|below"
    r"|versus|than|not|negative|percents?|inverses?|reciprocals?|opposites?|factorials?"
    r"|squared|cubed|sin|cos|tan)\b"
)
PLURAL = re.compile(r" ((?:[a-z]{3,} ){0,2}(?:[a-z]{2,}s|people|men|women|children|mice|teeth))")
NO_VARIABLES = re.compile(r"\\?(?:sqrt|frac|binom|overline|sin|cos|tan|log|ln|pi)")


def quantity(text):
    """-> (number, unit) of a flat text: ("9.8", "m^1 s^-2") of 9.8 m/s^2; "" for no unit. What
    stands behind the number is read as a whole: "5 apples minus 3" has none."""
    for place in PLACES.finditer(text):
        number, tail = text[: place.start()], text[place.start() :].rstrip()
        variables = re.search("[A-Za-z]", NO_VARIABLES.sub("", number))
        if unit := known_unit(tail, variables):
            return number, unit
        things = PLURAL.fullmatch(tail.lower())
        if things and not variables and not CHANGES.search(tail.lower()):
            return number, things[1].removesuffix("s")
    return text, ""


def known_unit(tail, variables):
    """The unit in a canonical order: " s^(-2)*m" -> "m^1 s^-2"; "" if it is none, as where letters
    are variables: behind variables or touching the number, and several small ones: 5 m g h."""
    for pattern, becomes in SPELLINGS:
        tail = re.sub(pattern, becomes, tail)
    factors, sign, powers = re.findall(FACTOR, tail), 1, {}
    if not re.fullmatch(f"(?:{FACTOR})++", tail) or factors[0][0]:
        return ""
    for operator, word, exponent in factors:
        lower, sign = word.lower(), -1 if operator == "/" else sign
        name = word if word in SYMBOLS else UNITS.get(lower) or UNITS.get(lower.removesuffix("s"))
        if not name:
            return ""
        powers[name] = powers.get(name, 0) + sign * int(exponent or 1)
    letters = [word for _, word, _ in factors if re.fullmatch("[A-Za-z]", word)]
    product = len(letters) > 1 and all(x.islower() for x in letters) and min(powers.values()) > 0
    touches = factors[0][1] in NEAR or not re.fullmatch("[A-Za-z]|[a-z]{2}", factors[0][1])
    if letters and (variables or product) or tail[0] != " " and not touches:
        return ""
    return " ".join(f"{name}^{powers[name]}" for name in sorted(powers))
