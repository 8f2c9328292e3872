"""A few sentences in every language of the recipes, for round-trip tests without downloads."""

SENTENCES = {
    "en": ["the quick brown fox didn't jump", "reading aloud is good practice"],
    "de": ["der fuchs läuft über die straße", "schöne grüße aus münchen"],
    "nl": ["de vos loopt over de weg", "wij zagen zeeën en ideeën"],
    "fr": ["l'été dernier nous étions à l'hôtel", "ça va très bien garçon"],
    "es": ["el niño comió una manzana ayer", "mañana será otro día"],
    "it": ["perché non è più così", "la città è bella di sera"],
    "pt": ["a manhã não é fria em são paulo", "coração e emoção"],
    "pl": ["zażółć gęślą jaźń", "piękny dzień nad rzeką"],
    "hi": ["मौसम आज बहुत अच्छा है", "वह किताब पढ़ रही है"],
    "bn": ["আজ আবহাওয়া খুব ভালো", "সে বই পড়ছে"],
    "ta": ["இன்று வானிலை நன்றாக உள்ளது", "அவள் புத்தகம் படிக்கிறாள்"],
    "te": ["ఈరోజు వాతావరణం చాలా బాగుంది", "ఆమె పుస్తకం చదువుతోంది"],
    "ml": ["ഇന്ന് കാലാവസ്ഥ വളരെ നല്ലതാണ്", "അവൾ പുസ്തകം വായിക്കുന്നു"],
    "kn": ["ಇಂದು ಹವಾಮಾನ ತುಂಬಾ ಚೆನ್ನಾಗಿದೆ", "ಅವಳು ಪುಸ್ತಕ ಓದುತ್ತಿದ್ದಾಳೆ"],
    "gu": ["આજે હવામાન ખૂબ સારું છે", "તે પુસ્તક વાંચે છે"],
    "mr": ["आज हवामान खूप छान आहे", "ती पुस्तक वाचत आहे"],
    "pa": ["ਅੱਜ ਮੌਸਮ ਬਹੁਤ ਚੰਗਾ ਹੈ", "ਉਹ ਕਿਤਾਬ ਪੜ੍ਹ ਰਹੀ ਹੈ"],
    "ur": ["آج موسم بہت اچھا ہے", "وہ کتاب پڑھ رہی ہے"],
    "ne": ["आज मौसम धेरै राम्रो छ", "उनी किताब पढ्दैछिन्"],
}
