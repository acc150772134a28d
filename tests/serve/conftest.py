from tests.chromium import browser as browser
from tests.chromium import open_page as open_page
