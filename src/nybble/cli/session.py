"""A conversation with a model: what was said, how answers are drawn, and what is asked next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nybble import store
from nybble.checkpoint import open_checkpoint
from nybble.cli.answer import Figures, Interrupt, note, note_ending, show_answer
from nybble.cli.markdown import writer_for_terminal
from nybble.cli.named import LOADING, Named, find_named, sampling, speculation
from nybble.cli.options import PrefixCache
from nybble.cli.prompt import Message, chat_prompt
from nybble.core.errors import ConfigError, PromptError
from nybble.engine.generate import Generator
from nybble.engine.load import LoadedModel
from nybble.engine.prefix_file import open_prefix_cache
from nybble.store.modelfile import Command, Value, format_modelfile

Load = Callable[[Named], LoadedModel]


class Session:
    """Many turns over one cache, so that each turn reads little more than what is new.

    load: makes a model ready, for `use`. given: what the command line said about sampling, by SamplingParams' names.
    kept: where the prefix cache is kept; by default nowhere.

    Raises:
        TokenizerError: the model has no chat template.
    """

    def __init__(
        self,
        named: Named,
        loaded: LoadedModel,
        *,
        load: Load,
        given: Mapping[str, object],
        threads: int | None,
        speculate: str | None,
        kept: PrefixCache | None = None,
    ) -> None:
        self.verbose = False
        self.markdown = True
        self._load = load
        self._given = dict(given)
        self._threads = threads
        self._speculate = speculate
        self._generator: Generator | None = None
        self._kept = kept or PrefixCache()
        self._interrupt = Interrupt()
        self._begin(named, loaded)

    def _begin(self, named: Named, loaded: LoadedModel) -> None:
        self.named = named
        self.loaded = loaded
        self.system = named.system
        self.template = named.template
        self.parameters: dict[str, Value] = dict(named.parameters)
        self.params = sampling(self.parameters, self._given)
        self.messages: list[Message] = [{"role": role, "content": text} for role, text in named.messages]
        chat_prompt(loaded, [*self._opening(), {"role": "user", "content": "-"}], self.template)  # says so if it cannot
        if self._generator is not None:
            self._generator.core.close()  # two engines cannot write one file
        self._generator = loaded.generator(
            speculate=speculation(named.parameters, self._speculate),
            kept_in=open_prefix_cache(loaded, self._kept.file, self._kept.size),
        )
        self._figures = Figures(loaded, self._threads)

    def ask(self, text: str) -> None:
        """Answer a message. A stopped answer stays as far as it came; one that never began leaves no trace."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        token_ids = chat_prompt(self.loaded, [*self._opening(), *asked], self.template)
        assert self._generator is not None
        try:
            with self._interrupt.listen():
                steps = self._generator.generate([token_ids], self.params)
                answer = show_answer(
                    steps,
                    num_prompt_tokens=len(token_ids),
                    interrupt=self._interrupt,
                    writer=writer_for_terminal(self.markdown),
                )
        except PromptError:
            note(
                f"the conversation has {len(token_ids)} tokens now and the context holds {self.loaded.context}: your "
                "last message was not sent; shorten it, start over with /clear, or come back with a larger --ctx"
            )
            return
        if answer.num_new_tokens > 0:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        note_ending(answer, self.params, self.loaded.context)
        if self.verbose:
            note(self._figures.line(answer))

    def clear(self) -> None:
        """Forget what was said, down to the Modelfile's own messages."""
        self.messages = [{"role": role, "content": text} for role, text in self.named.messages]

    def set_parameter(self, name: str, value: Value) -> None:
        """Change how answers are drawn from now on. Raises ConfigError if the value is out of range."""
        if name in LOADING:
            raise ConfigError(f"{name} matters when a model is loaded: /save the model and /load it again")
        parameters = {**self.parameters, name: value}
        fields = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens"}
        given = {key: old for key, old in self._given.items() if key != fields.get(name, name)}
        self.params = sampling(parameters, given)
        self.parameters, self._given = parameters, given

    def set_system(self, text: str) -> None:
        """Another system message. Raises TokenizerError if the template takes none."""
        opening: list[Message] = [{"role": "system", "content": text}] if text else []
        chat_prompt(self.loaded, [*opening, {"role": "user", "content": "-"}], self.template)
        self.system = text or None

    def use(self, name: str) -> None:
        """Another model, or one that was saved with its conversation. Raises as `find_named` and loading do."""
        named = find_named(name)
        open_checkpoint(named.path)  # while the old one is still here, if it is damaged
        self._begin(named, self._load(named))

    def save(self, name: str) -> None:
        """Keep the model as it is now, with what was said. Raises ConfigError or StoreError."""
        lines = [Command("FROM", str(self.named.path.absolute()))]
        if self.named.adapter is not None:
            lines.append(Command("ADAPTER", str(self.named.adapter.absolute())))
        if self.template is not None:
            lines.append(Command("TEMPLATE", self.template))
        if self.system is not None:
            lines.append(Command("SYSTEM", self.system))
        for parameter, value in self.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(Command("PARAMETER", str(one), parameter))
        lines += [Command("MESSAGE", message["content"], message["role"]) for message in self.messages]
        store.Library().create(name, format_modelfile(lines), base_folder=Path.cwd(), progress=lambda message: None)

    def _opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system is not None else []
