"""The users: the contract that others import, and the service that owns them."""

from cauce import Command, Domain, Event, Record, Rejected, Service, replace

users = Domain("users", key="user_id")


class User(Record, domain=users):
    user_id: str
    name: str
    email: str


class UserRegistered(Event, domain=users):
    user_id: str
    name: str
    email: str


class EmailChanged(Event, domain=users):
    user_id: str
    email: str


class RegisterUser(Command, domain=users):
    user_id: str
    name: str
    email: str


class ChangeEmail(Command, domain=users):
    user_id: str
    email: str


service = Service("users", owns=users)


@service.decide
def register(user: User | None, command: RegisterUser) -> UserRegistered:
    if user is not None:
        raise Rejected(f"user {command.user_id} is already registered")
    return UserRegistered(command.user_id, command.name, address(command.email))


@service.decide
def change_email(user: User | None, command: ChangeEmail) -> EmailChanged | None:
    if user is None:
        raise Rejected(f"there is no user {command.user_id}")
    return None if user.email == command.email else EmailChanged(command.user_id, address(command.email))


@service.evolve
def registered(user: User | None, event: UserRegistered) -> User:
    return User(event.user_id, event.name, event.email)


@service.evolve
def email_changed(user: User, event: EmailChanged) -> User:
    return replace(user, email=event.email)


def address(email: str) -> str:
    if "@" not in email:
        raise Rejected("that is no e-mail address")
    return email
