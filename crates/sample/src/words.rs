//! The words of the stories and the fixed facts that bind them.

/// Names with the pronoun that goes with each; earlier names are likelier.
pub const NAMES: &[(&str, bool)] = &[
    ("Mina", true),
    ("Theo", false),
    ("Lotte", true),
    ("Oskar", false),
    ("Nora", true),
    ("Emil", false),
    ("Frida", true),
    ("Jonas", false),
    ("Clara", true),
    ("Anton", false),
    ("Ida", true),
    ("Felix", false),
    ("Greta", true),
    ("Hugo", false),
    ("Elsa", true),
    ("Karl", false),
    ("Maja", true),
    ("Paul", false),
    ("Rosa", true),
    ("Leo", false),
    ("Tilda", true),
    ("Bruno", false),
    ("Vera", true),
    ("Arno", false),
    ("Selma", true),
    ("Kurt", false),
    ("Wanda", true),
    ("Rolf", false),
    ("Edda", true),
    ("Nils", false),
    ("Gisela", true),
    ("Viktor", false),
    ("Hedwig", true),
    ("Gustav", false),
    ("Petra", true),
    ("Ludwig", false),
];

/// What a child is called, and the virtue that its story ends with.
pub const TRAITS: &[(&str, &str)] = &[
    ("brave", "courage"),
    ("kind", "kindness"),
    ("patient", "patience"),
    ("honest", "honesty"),
    ("curious", "curiosity"),
    ("careful", "care"),
    ("generous", "sharing"),
    ("stubborn", "trying again"),
    ("quiet", "listening"),
    ("cheerful", "a good laugh"),
    ("clever", "a good idea"),
    ("gentle", "gentleness"),
];

/// Places, with who lives there.
pub const PLACES: &[(&str, &str)] = &[
    ("the old mill", "miller"),
    ("the harbour", "fisherman"),
    ("the forest", "forester"),
    ("the bakery", "baker"),
    ("the castle", "queen"),
    ("the farm", "farmer"),
    ("the lighthouse", "keeper"),
    ("the market", "merchant"),
    ("the smithy", "smith"),
    ("the garden", "gardener"),
    ("the library", "librarian"),
    ("the mountain", "shepherd"),
    ("the theatre", "singer"),
    ("the school", "teacher"),
    ("the workshop", "carpenter"),
    ("the station", "driver"),
];

/// Animals, with what each eats and the sound that it makes.
pub const ANIMALS: &[(&str, &str, &str)] = &[
    ("dog", "bones", "barked"),
    ("cat", "fish", "purred"),
    ("goose", "grass", "honked"),
    ("goat", "leaves", "bleated"),
    ("pony", "hay", "neighed"),
    ("raven", "seeds", "croaked"),
    ("hedgehog", "worms", "snuffled"),
    ("owl", "mice", "hooted"),
    ("piglet", "turnips", "squealed"),
    ("duck", "bread", "quacked"),
    ("fox", "berries", "yapped"),
    ("bear", "honey", "growled"),
    ("squirrel", "nuts", "chattered"),
    ("frog", "flies", "croaked loudly"),
];

/// Things, with the colour that each always has.
pub const THINGS: &[(&str, &str)] = &[
    ("kite", "red"),
    ("lantern", "red"),
    ("wagon", "red"),
    ("scarf", "red"),
    ("apple", "red"),
    ("boat", "blue"),
    ("marble", "blue"),
    ("umbrella", "blue"),
    ("vase", "blue"),
    ("cap", "blue"),
    ("whistle", "silver"),
    ("key", "silver"),
    ("bell", "silver"),
    ("spoon", "silver"),
    ("coin", "silver"),
    ("book", "green"),
    ("bottle", "green"),
    ("ribbon", "green"),
    ("bucket", "green"),
    ("coat", "green"),
    ("ring", "golden"),
    ("crown", "golden"),
    ("feather", "golden"),
    ("medal", "golden"),
    ("clock", "golden"),
    ("box", "brown"),
    ("drum", "brown"),
    ("chair", "brown"),
    ("ladder", "brown"),
    ("violin", "brown"),
];

/// The colours of [`THINGS`].
pub const COLOURS: &[&str] = &["red", "blue", "silver", "green", "golden", "brown"];

/// What is counted.
pub const COUNTED: &[&str] = &["pears", "plums", "buttons", "stones", "shells", "cherries", "candles", "eggs"];

/// Numbers by value, from zero.
pub const NUMBERS: &[&str] =
    &["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];

/// Weather, with what it does to people.
pub const WEATHER: &[(&str, &str)] = &[
    ("The sun was shining", "warm"),
    ("Snow was falling", "cold"),
    ("It was raining", "wet"),
    ("A strong wind was blowing", "tired"),
    ("Thick fog lay over the fields", "lost"),
    ("The stars were out", "sleepy"),
];

/// Times of day.
pub const TIMES: &[&str] =
    &["morning", "evening", "afternoon", "night", "spring day", "winter day", "Sunday", "summer day"];

/// How people feel.
pub const FEELINGS: &[&str] = &["happy", "proud", "sad", "angry", "afraid", "surprised", "glad", "worried"];
