"""The numbers of the paper (arXiv 2401.02412), as printed.

A table is {row: {column: number}}. The columns are "base" (m_A before it was
trained on its domain), "augmenting" (m_A), "anchor" (m_B), "composed" (CALM)
and the kinds of configs/common.py; "finetune" is m_B trained on all of the
domain, the paper's m_B^NTL and m_B^Code. Rows are called as in results.json.
"""

MODELS = {
  "table-1": "The paper's m_A is a PaLM2-XXS, its m_B a PaLM2-XS.",
  "others": "The paper's m_A is a PaLM2-XXS, its m_B a PaLM2-S.",
}


def _read(text: str) -> dict[str, dict[str, float]]:
  """A line a row, the first one names the columns; a dash is no number."""
  head, *lines = [line.split() for line in text.strip().splitlines()]
  return {
    name: {
      column: float(number)
      for column, number in zip(head, numbers, strict=True)
      if number != "-"
    }
    for name, *numbers in lines
  }


AVERAGE = "average"

# Accuracy in %.
TABLE1 = _read("""
augmenting anchor composed
kv_subs   98.1  0.0 92.9
num_math   4.2 73.7 72.0
kv_math    0.7  0.0 84.3
""")

# chrF1. The paper writes lij, mr, taq, ... without a script.
TABLE2 = _read("""
base augmenting anchor composed finetune
lij_Latn 24.0 32.0 32.6 44.1 48.1
mar_Deva 16.5 21.6 24.2 30.4 39.1
taq_Latn 21.6 46.9 44.6 55.1 59.2
nno_Latn 33.3 50.0 50.8 54.6 57.5
sun_Latn 20.6 40.6 50.9 54.4 57.3
ban_Latn  2.1  4.1  5.4 11.8 11.4
pol_Latn  5.3  4.0  9.5 11.3  9.9
tha_Thai 63.2 63.8 69.0 69.4 69.4
min_Latn 44.0 47.8 61.0 61.1 61.4
acm_Arab 59.8 61.1 68.6 68.9 69.0
average  29.0 37.2 41.7 46.1 48.2
""")

# Accuracy in %.
TABLE3_LOW = _read("""
base augmenting anchor composed finetune
meo 5.2 7.6 28.8 34.0 33.2
mfa 6.8 4.0 14.0 17.6 20.4
pcm 6.8 4.4 34.4 33.6 31.6
efi 4.0 3.2 14.8 18.0 14.0
min 5.6 6.0 25.2 23.6 24.8
ilo 7.2 4.8 14.8 16.8 14.0
ady 6.0 6.4 30.0 36.4 29.2
mai 3.6 3.2 22.8 24.8 21.2
nso 7.2 6.0  8.4  8.4  9.6
mzn 6.8 4.8 31.6 36.4 27.6
average 5.9 5.0 22.5 25.0 22.6
""")
TABLE3_HIGH = _read("""
base augmenting anchor composed finetune
en 5.6 4.8 36.8 37.2 36.0
te 4.0 3.6 19.2 28.0 17.6
bn 2.0 3.2 23.2 27.2 18.4
sw 7.6 4.8 16.0 18.0 14.4
ja 2.0 3.2  2.0  2.4  0.8
zh 4.4 7.6 39.2 43.6 33.6
th 6.0 6.4 29.6 33.2 27.2
fr 6.8 9.2 38.0 42.8 34.8
es 5.6 5.6 32.4 36.0 31.2
de 9.2 7.2 43.2 49.2 42.0
average 5.3 5.6 28.0 31.8 25.6
""")

# pass@1 in %, chrF1 from CodeXGLUE on.
TABLE4 = _read("""
augmenting anchor composed finetune
HumanEval  19.5 16.4 22.5 24.3
MBPP       28.0 28.6 32.2 43.0
python     28.0 30.4 30.5 18.9
php        34.7 35.5 35.8 35.0
go         32.6 40.4 40.6 41.1
java       29.6 31.0 31.4 31.1
javascript 26.5 28.8 29.3 20.2
ruby       26.0 27.9 29.0 27.6
""")

TABLE5 = _read("""
finetune composed vanilla random encoder lora
FLORES-200 62.1 60.5 59.2 58.8 59.3 59.2
GSM8K      19.8 21.4 19.0 17.8 19.1 20.9
MGSM       27.1 33.1 29.7 28.5 29.1 31.2
HumanEval  24.3 22.5 20.0 20.1 16.0 18.3
MBPP       43.0 32.2 28.0 27.0 27.0 28.7
CodeXGLUE  29.0 32.6 32.2 32.1 32.0 32.6
""")
# For how many languages a model is better than m_B: of 192, 25 and 11.
TABLE5_BETTER = _read("""
finetune composed vanilla random encoder lora
FLORES-200 171 175 115 43 102 82
GSM8K       15  20  15  9  12 15
MGSM         1  11   8  4   6  9
""")
TABLE5_OF = {"FLORES-200": 192, "GSM8K": 25, "MGSM": 11}

# Accuracy in %; those of Table 3 and 15 more.
TABLE6 = _read("""
augmenting anchor composed finetune
meo 7.6 28.8 34.0 33.2
mfa 4.0 14.0 17.6 20.4
pcm 4.4 34.4 33.6 31.6
efi 3.2 14.8 18.0 14.0
min 6.0 25.2 23.6 24.8
ilo 4.8 14.8 16.8 14.0
ady 6.4 30.0 36.4 29.2
mai 3.2 22.8 24.8 21.2
nso 6.0  8.4  8.4  9.6
mzn 4.8 31.6 36.4 27.6
bew 4.4 33.6 34.8 33.6
ts  4.8  7.2 10.0 11.6
dv  2.8 11.2 14.8 13.2
bho 4.0 23.6 29.2 22.8
cv  6.0 17.6 16.4 20.4
mni 3.6  2.8  4.4  6.0
or  2.4  9.6 12.4 12.0
kri 5.6 12.4 18.8 20.0
tk  5.2 27.2 29.2 28.8
gom 4.8 22.4 25.2 22.8
ug  6.0 23.2 29.2 26.4
ckb 3.2 25.6 28.0 27.2
as  1.2  5.2  9.2  4.0
doi 3.6 17.2 22.4 21.6
dz  4.4  0.8  0.4  0.0
average 4.5 18.6 21.4 19.8
""")

# Appendix C.1's example: BERT-small as m_A, BERT-large as m_B.
C1 = {
  "connections": 4,
  "augmenting_width": 512,
  "anchor_width": 1024,
  "anchor_layers": 24,
  "vocabulary": 30_000,
  "mlp": 4,
}
