"""Reading ahead: what is likely to be asked for next is read by a thread meanwhile, so that a GPU
that generates or trains need not wait for pictures to be decoded."""

import threading
from concurrent.futures import Future


class Ahead:
    """A function of one argument, `read`, whose results may be prepared: ahead(item) is read(item),
    whoever has read it, and raises what that raises.

    One thread reads the items of `begin` in their order, and is gone when it has read them all.
    Whoever calls does not wait for what it has not begun with, but reads that itself, so that two
    readers share the work. When the program ends, however it ends, the thread ends after the item
    at hand.
    """

    def __init__(self, read):
        self.read, self.promised = read, {}

    def __call__(self, item):
        found = self.promised.pop(item, None)
        if found is None or found.cancel():  # nobody has begun with it
            return self.read(item)
        return found.result()

    def begin(self, items):
        """Let a thread read these items. What was promised before and is not among them is dropped:
        a guess that was wrong costs no more than the reading."""
        for found in self.promised.values():
            found.cancel()
        self.promised = {item: Future() for item in items}
        if self.promised:
            threading.Thread(target=self._work, args=(list(self.promised.items()),)).start()

    def _work(self, promised):
        for item, found in promised:
            if not threading.main_thread().is_alive():
                return
            if found.set_running_or_notify_cancel():
                try:
                    found.set_result(self.read(item))
                except BaseException as error:  # said by whoever asks for the item
                    found.set_exception(error)
