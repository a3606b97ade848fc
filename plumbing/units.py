r"""A quantity as its number and its unit: 5 N·m, 9.8 m s^{-2}, 5 平方厘米, 5 apples.

Only what is known here is a unit. Words that are not known are forgiven behind a number only where
they count things, in the plural and free of the words that make another number of it: a policy
learns what is forgiven.
"""

import re


def table(text):
    """ "m meter metre; g gram" -> {"m": ["meter", "metre"], "g": ["gram"]}"""
    return {symbol: names for symbol, *names in (row.split() for row in text.split(";"))}


# Symbols and their names; a name is in lower case and without the s of a plural.
PREFIXES = table("k kilo; M mega; G giga; d deci; c centi; m milli; µ micro; n nano; p pico")
# Units that take these prefixes. Their symbols mind the case: 3 MW is not 3 mW.
METRIC = table(
    "m meter metre; g gram gramme; s second sec; L liter litre; N newton; J joule; W watt;"
    "Pa pascal; V volt; A ampere amp; K kelvin; Omega ohm; F farad; C coulomb; Hz hertz; T tesla;"
    "mol mole; eV electronvolt"
)
OTHERS = table(
    "% %; degree deg degree 度; celsius celsius 摄氏度; fahrenheit fahrenheit; rad rad radian 弧度;"
    "in in inch inche; ft ft foot feet; yd yd yard; mi mi mile; acre acre; gal gallon;"
    "lb lb pound; oz oz ounce; t ton tonne 吨; min min minute 分钟 分; h h hr hour 小时 时;"
    "day day 天 日; week week 周; month month 月; year yr year 年 岁;"
    "dollar dollar usd 美元; euro euro eur 欧元; yuan yuan rmb cny 元; gbp gbp; cent cent;"
    "m 米; km km 千米 公里; dm 分米; cm cm 厘米; mm mm 毫米; kg kg 千克 公斤; g 克; mg mg;"
    "L l 升; mL ml 毫升; s 秒; N 牛顿 牛; J 焦耳 焦; W 瓦; V 伏; A 安; Omega 欧姆 欧;"
    "kOmega kilohm; Hz hz; unit unit;"
    "个 个 只 条 人 名 张 本 次 种 件 块 支 根 颗 辆 头 棵 道 位 台 盒 箱"
)
SHORT = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kWh": "kW*h", "Nm": "N*m", "Ah": "A*h"}
SYMBOLS = {prefix + symbol for symbol in METRIC for prefix in ["", *PREFIXES]}
NAMES = {name: symbol for units in (METRIC, OTHERS) for symbol in units for name in units[symbol]}
for prefix, (word,) in PREFIXES.items():
    NAMES |= {word + name: prefix + symbol for symbol, names in METRIC.items() for name in names}
CHINESE = sorted((n for n in NAMES if "一" <= n[0] <= "龥"), key=len, reverse=True)

POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "立方": 3}
SPACED = re.compile(f"({'|'.join(['平方', '立方', '每', *CHINESE])})")
TOKEN = re.compile(r" *(?:(µ?[A-Za-z]+|[一-龥]+|%)|\^ ?\(?(-?\d)\)?|([*/])|(\S))")
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
FUNCTIONS = re.compile("sqrt|root|sin|cos|tan|log|ln|pi")


def quantity(text):
    r"""-> (number, unit): "9.8 m/s^2" -> ("9.8", "m^1 s^-2"); the unit is "" if there is none.

    text: flat, as plumbing/latex.py makes it. What stands behind the number is read as a whole:
    "5 apples minus 3" has no unit.
    """
    text = re.sub(r"\bmu ?(?=[A-Za-z])", "µ", text)
    text = re.sub(r"\b([kMm]) (?=Omega)", r"\1", text)
    text = re.sub(r"(?i)\bdegrees? ?(?:C|celsius)(?![a-z])", "celsius", text)
    text = re.sub(r"(?i)\bdegrees? ?(?:F|fahrenheit)(?![a-z])", "fahrenheit", text)
    for place in PLACES.finditer(text):
        number, tail = text[: place.start()], text[place.start() :]
        variables = re.search("[A-Za-z]", FUNCTIONS.sub("", number))
        if tail.strip() and (unit := known(tail, variables) or counted(tail, variables)):
            return number, unit
    return text, ""


def known(tail, variables):
    """The unit in a canonical order: " s^(-2)*m" -> "m^1 s^-2"; "" if it is no known unit.

    Letters are variables, not units, where they touch the number or where it has variables itself;
    so are several small ones without a division: 5m, (x+1) m and 5 m g h.
    """
    units, sign, power = [], 1, 1
    for word, exponent, operator, other in TOKEN.findall(SPACED.sub(r" \1 ", expanded(tail))):
        if other or not units and (not word or word in ("per", "每", "squared", "cubed")):
            return ""
        if operator or word in ("per", "每"):
            sign = sign if operator == "*" else -1
        elif exponent or word in ("squared", "cubed"):
            units[-1][1] *= int(exponent or {"squared": 2, "cubed": 3}[word])
        elif word in POWERS:
            power = POWERS[word]
        else:
            name = named(word)
            if not name or not units and not tail.startswith(" ") and not may_touch(word):
                return ""
            units.append([name, sign * power, word])
            power = 1
    letters = [word for _, _, word in units if re.fullmatch("[A-Za-z]", word)]
    product = len(letters) > 1 and all(x.islower() for x in letters)
    if letters and (variables or product and all(p > 0 for _, p, _ in units)) or power != 1:
        return ""
    total = {name: sum(p for n, p, _ in units if n == name) for name, _, _ in units}
    return " ".join(f"{name}^{total[name]}" for name in sorted(total))


def named(word):
    """The symbol of a unit in any spelling; None for another word."""
    lower = word.lower()
    return word if word in SYMBOLS else NAMES.get(lower) or NAMES.get(lower.removesuffix("s"))


def expanded(tail):
    """Without short forms and brackets: " kWh" -> " kW*h", " J/(kg*K)" -> " J/kg*K"."""
    tail = re.sub(r"[A-Za-z]+", lambda m: SHORT.get(m[0], m[0]), tail)
    return re.sub(r"/ ?\(([^()]*)\)$", r"/\1", tail)


def may_touch(word):
    """Whether a number may stand right before the unit: 5cm and 5kN, but 5m is a product."""
    return word in NEAR or not word.islower() if len(word) == 2 else not re.match("[A-Za-z]$", word)


def counted(tail, variables):
    """What is counted, in the plural: " red apples" -> "red apple"; "" for what counts nothing."""
    noun = PLURAL.fullmatch(tail.lower().rstrip())
    if not noun or variables or CHANGES.search(noun[0]):
        return ""
    return noun[1].removesuffix("s")
