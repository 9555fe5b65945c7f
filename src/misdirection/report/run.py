class _Page:
    def write(self, result, folder):
        return folder
    def summary(self, result):
        return ""
PAGE = _Page()
