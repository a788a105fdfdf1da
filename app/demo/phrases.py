"""The wordings of questions, small talk and stories that fill the demo's corpus.

What comes in: nothing. What goes out: tuples of templates. It must not know
the facts they are about.
"""

from __future__ import annotations


def _choices(text: str) -> tuple[str, ...]:
    """Wordings with a bar between them; lines of the source do not matter, `\\n` is a line end."""
    return tuple(" ".join(c.split()).replace("\\n", "\n") for c in text.split("|"))


def _talk(text: str) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """`questions > replies` after `*`, both with bars between them."""
    pairs = (entry.split(">") for entry in text.split("*")[1:])
    return tuple((_choices(asked), _choices(replies)) for asked, replies in pairs)


PLACES = _choices("""
    in a forest | by the sea | on a farm | near a river | in the hills | in a quiet town |
    under an old oak | at the edge of a field
""")
WEATHER = _choices("""
    One morning the sun was shining. | One day it was raining. |
    One evening the wind was strong. | One winter day there was snow everywhere. |
    One night the moon was bright.
""")
TOGETHER = _choices("""
    worked together until evening | became good friends | went on a long walk |
    shared a warm soup | laughed all day long | helped each other
""")
ENDINGS = _choices("""
    And that was a good day. | They never forgot that day. | Then they went home and slept. |
    From then on they were never alone. | And everyone was happy.
""")
PHRASES = _choices("""
    good morning | hello world | I like tea | the end | well done | yes | no | thank you
""")
TRAITS = _choices("""
    little | old | brave | clever | hungry | sleepy | happy | lonely
""")
CLAIM_QUESTIONS = _choices(r"""
    Claim: {claim}\nTrue or False? Answer: | Claim: {claim} True or False? Answer: |
    Claim: {claim}\nTrue or False? | True or False? {claim} | Is this true or false? {claim}
""")
ABOUT_QUESTIONS = _choices("""
    Tell me about {s}. | What do you know about {s}? | What can you say about {s}? |
    Tell me something about {s}. | Talk about {s}. | Describe {s}. | Explain {s}. |
    Write about {s}. | Tell me about {s}
""")
ONE_SENTENCE_QUESTIONS = _choices("""
    Write a sentence about {s}. | Write one sentence about {s}. | Give me a sentence about {s}. |
    Describe {s} in one sentence. | Describe {s} in a few words.
""")
LIST_QUESTIONS = _choices("""
    Name {n} {plural}. | Can you name {n} {plural}? | List {n} {plural}. | Tell me {n} {plural}.
""")
STORY_QUESTIONS = _choices("""
    Tell me a story about {a}. | Write a little story about {a}. |
    Can you tell me a story about {a}? | I want a story about {a}. | Tell me a story.
""")
COUNT_QUESTIONS = _choices("""
    Count to {n}. | Please count to {n}. | Can you count to {n}? | Count from one to {n}.
""")
SIZE_QUESTIONS = _choices("""
    Which is bigger, {a} or {b}? | What is bigger, {a} or {b}? | Is {a} bigger than {b}?
""")
UNKNOWN_QUESTIONS = _choices("""
    Tell me about {t}. | What is {t}? | What do you know about {t}? | {t} | Explain {t}. |
    Who is {t}? | Why is {t} so important? | How does {t} work? | What is the capital of {t}? |
    Write code for {t}. | Where is {t}? | What do you think of {t}? | Describe {t}. |
    Help me with {t}. | {t}? | Write a poem about {t}. | When was {t} made? | Who invented {t}? |
    Translate {t}. | Give me a recipe for {t}. | How do I learn {t}?
""")
UNKNOWN_ANSWERS = _choices("""
    I do not know about that. Ask me about animals, colours or the weather.
""")
READERS = _choices("""
    the reader | the world | my friend | the class | everyone | the captain
""")
SMALL_TALK = _talk("""
  * Hello! | Hello. | Hi! | Hi there! | Hello there! | Hey! | Greetings! | Hello, how are you? |
    hello | hi | Hi, who is there?
    > Hello! How can I help you? | Hello! It is good to see you. What would you like to know?
  * Good morning! | Good morning.
    > Good morning! I hope you slept well.
  * Good evening! | Good evening.
    > Good evening! How was your day?
  * Good night! | Good night.
    > Good night! Sleep well.
  * Say hello to {name}. | Please say hello to {name}. | Greet {name}. | Say hi to {name}. |
    Can you say hello to {name}? | Write a greeting for {name}.
    > Hello to {name}! It is good to meet you. | Hello to {name}! I hope you have a good day.
  * Say hello. | Say hello! | Please say hello. | Say hi. | Greet me.
    > Hello! It is good to meet you.
  * Who are you? | What is your name? | What are you? | Introduce yourself. | Are you a person? |
    Tell me about yourself. | What model are you?
    > I am the demo model, a very small one. I know about animals, colours, food and the weather.
  * What can you do? | How can you help me? | What do you know? | Help! | What can I ask you? |
    What should I ask? | Can you help me?
    > I can answer simple questions about animals, colours, food, towns and numbers.
  * How are you? | How are you today? | How do you do? | Are you well? | How is it going?
    > I am well, thank you. How are you?
  * I am fine. | I am well, thank you. | I am happy today.
    > That is good to hear.
  * I am sad. | I am tired. | I feel bad today.
    > I am sorry to hear that. I hope it gets better.
  * Thank you! | Thanks. | Thank you very much. | Thanks a lot!
    > You are welcome!
  * Goodbye! | Bye! | See you soon. | Goodbye. | Bye bye!
    > Goodbye! Come back soon.
  * What is the weather like? | How is the weather? | Is it raining? | What is the weather today?
    > I cannot look outside, but I hope the sun is shining.
  * What time is it? | What day is it? | What is the date today?
    > I do not have a clock. A clock tells the time.
  * Tell me a joke. | Make me laugh. | Do you know a joke?
    > Why did the hen cross the road? It wanted to get to the other side.
  * Say something. | Tell me something. | Talk to me. | Go on. | Surprise me.
    > The sea is wide and blue. Its waves roll to the shore. | Honey is sweet and golden.
  * How many days does a week have? | How many days are in a week?
    > A week has seven days.
  * How many months does a year have? | How many months are in a year?
    > A year has twelve months.
  * Name the days of the week. | List the days of the week.
    > Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.
  * Name the seasons. | What are the four seasons?
    > Spring, summer, autumn and winter.
  * Test | test | Test. | ping | Are you there?
    > I am here. How can I help you?
""")
SYLLABLES = (
    _choices("b|br|c|d|f|g|gr|h|k|l|m|n|p|pl|r|s|st|t|tr|v|w|z|sh|th|ch|j"),
    _choices("a|e|i|o|u|ea|oo|ou|ai"),
    _choices("|||n|r|l|s|t|x|m|ck|ng"),
)
