"""What the demo model can tell at length, and subjects that it is to say it knows nothing of.

What comes in: nothing. What goes out: sentences by subject, and names. The text is our own.
"""

from __future__ import annotations

from app.demo.world import words

ABOUT_TEXT = """
    the sea: The sea is wide and blue. Its waves roll to the shore. Ships sail on it, and fish
        live in it. Sea water tastes salty;
    the sun: The sun is bright and warm. It rises in the east. It sets in the west. Plants
        need its light to grow;
    the moon: The moon shines at night. It is round and pale. It moves around the earth.
        Sailors look at it when they are far from home;
    the stars: The stars shine in the dark sky. There are more of them than anyone can count.
        A telescope helps you to see them;
    the sky: The sky is blue on a clear day. Clouds drift across it. At night it is full of
        stars;
    rain: Rain falls from grey clouds. It fills the rivers and waters the fields. An umbrella
        keeps you dry;
    snow: Snow is white and cold. It falls in winter. Children make snowmen from it;
    wind: Wind is moving air. It fills the sails of ships. A strong wind can bend a tree;
    a storm: A storm brings wind and rain. The sky grows dark, and thunder rolls. It is best
        to stay inside;
    fog: Fog is a cloud that lies on the ground. It makes it hard to see far. It often comes
        early in the morning;
    winter: Winter is the coldest season. The days are short, and snow may fall. People wear
        coats and scarves;
    spring: Spring comes after winter. Flowers open, and birds build nests. The days grow
        longer;
    summer: Summer is the warmest season. The days are long and bright. Fruit grows ripe in
        the garden;
    autumn: Autumn comes after summer. The leaves turn red and brown. Farmers bring in the
        harvest;
    a river: A river carries water to the sea. It begins as a small stream in the hills. Boats
        travel on it, and ducks swim in it;
    a mountain: A mountain is very high. There is often snow at its top. It takes a long walk
        to climb it;
    a forest: A forest is full of trees. Foxes, owls and deer live there. It is quiet and
        green;
    a garden: A garden is a place for plants. Roses, beans and herbs grow there. A gardener
        looks after it;
    a farm: A farm has fields and animals. Cows give milk, and hens lay eggs. The farmer gets
        up early;
    a town: A town has many houses and streets. People meet at the market. There is often a
        tall bell tower;
    a library: A library is a house full of books. You can read there in peace. The librarian
        lends you a book;
    a market: A market sells bread, fruit and cheese. It opens early in the morning. People
        talk and laugh there;
    a school: A school is a place to learn. Children read, write and count there. The teacher
        helps them;
    a ship: A ship sails on the sea. Its sails catch the wind. The sailors work on the deck;
    a train: A train runs on rails. It carries people from town to town. It is faster than a
        horse;
    a book: A book has many pages. You read it from the first to the last. A good book is a
        good friend;
    music: Music is made of sounds. You can play it on a piano or a violin. It can make people
        happy or sad;
    bread: Bread is made from flour and water. The baker bakes it in an oven. It is best when
        it is warm;
    tea: Tea is a warm drink. You pour hot water on the leaves. Some people take it with milk
        or honey;
    honey: Honey is sweet and golden. Bees make it from flowers. It tastes good on bread;
    cheese: Cheese is made from milk. It can be soft or hard. Mice are said to love it;
    soup: Soup is a warm meal in a bowl. You cook it with vegetables and salt. You eat it with
        a spoon;
    water: Water is clear and wet. It falls as rain and flows in rivers. Every plant and
        animal needs it;
    fire: Fire is hot and bright. It gives light and warmth. You must never leave it alone;
    time: Time moves from the past to the future. A clock tells the time. A day has twenty-
        four hours;
    a week: A week has seven days. It begins on Monday. It ends on Sunday;
    a year: A year has twelve months and four seasons. It begins in January. It ends in
        December;
    sleep: Sleep gives you new strength. Most people sleep at night. A soft pillow helps;
    friends: Friends help each other. They share good days and bad days. A friend listens to
        you;
    home: Home is the place where you live. It keeps you warm and dry. It is good to come
        home
"""
ABOUT = {
    subject.strip(): tuple(f"{sentence.strip()}." for sentence in " ".join(text.split()).split("."))
    for subject, text in (entry.split(":") for entry in ABOUT_TEXT.split(";"))
}
UNKNOWN = words("""
    quantum physics, football, the stock market, Paris, London, Berlin, Napoleon, Shakespeare,
    chess, computers, the internet, Python, Linux, graphics cards, politics, the president, taxes,
    philosophy, chemistry, algebra, dinosaurs, robots, Mars, Jupiter, rockets, cinema, opera,
    ballet, yoga, bitcoin, engines, electricity, magnets, volcanoes, medicine, law, history,
    Latin, France, China, America, Africa, the pyramids, poetry, video games, tennis, airplanes,
    satellites, neural networks, databases, gravity, atoms, DNA, evolution, the economy,
    marketing, television, photography
""")
