from tests.chromium import browser as browser
from tests.chromium import open_page as open_page
from tests.web.agent import agent as agent
from tests.web.agent import node as node
