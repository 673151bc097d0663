package roomserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Deactivated reports whether an account of this server is deactivated, or about to be. It is false for an unknown account.
type Deactivated func(ctx context.Context, userID string) (bool, error)

// CheckedOutbox is an Outbox that checks the sender of a delayed event before it sends the event. When the event was scheduled, the sender
// was logged in and in the room. Both can have changed since, and Dendrite does not always check them. An event needs no account. The auth
// rules let a user who is out of the room join a public room, and set its aliases. State that the room already has is not sent at all, but
// its event ID would be shown to the sender.
//
// Closing events are not checked: the homeserver sends them for an event that is already in the room.
type CheckedOutbox struct {
	*Outbox
	deactivated Deactivated
}

var _ expiration.Roomserver = (*CheckedOutbox)(nil)

// NewCheckedOutbox returns an outbox that checks the sender's account and membership.
func NewCheckedOutbox(inner *Outbox, deactivated Deactivated) *CheckedOutbox {
	return &CheckedOutbox{Outbox: inner, deactivated: deactivated}
}

// notJoined is the refusal of an event whose sender is not in the room.
var notJoined = json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"The sender is no longer in the room"}`)

// Send implements expiration.Roomserver. The error is a *expiration.DropError if the account is deactivated.
func (out *CheckedOutbox) Send(
	ctx context.Context, t expiration.Timer, o expiration.Outcome, claim func(context.Context, expiration.Built) error,
) (string, error) {
	if err := out.checkAccount(ctx, t.Event); err != nil {
		return "", err
	}
	built := false
	eventID, err := out.Outbox.Send(ctx, t, o, func(ctx context.Context, b expiration.Built) error {
		built = true
		if err := out.checkMember(ctx, t.Event); err != nil {
			return err
		}
		return claim(ctx, b)
	})
	if err == nil && !built { // the room has the same state already
		err = out.checkMember(ctx, t.Event)
	}
	return eventID, err
}

// Resubmit implements expiration.Roomserver. An event that the roomserver already has is finished, because it was sent before the account
// was deactivated.
func (out *CheckedOutbox) Resubmit(ctx context.Context, t expiration.Timer, signed expiration.SignedEvent) error {
	if t.Delayed != nil {
		if err := out.checkAccount(ctx, t.Event); err != nil {
			if known, lookErr := out.event(ctx, t.Event.RoomID, signed.EventID); lookErr != nil || known == nil {
				return err
			}
		}
	}
	return out.Outbox.Resubmit(ctx, t, signed)
}

// checkAccount returns a *expiration.DropError if the sender's account is deactivated.
func (out *CheckedOutbox) checkAccount(ctx context.Context, e expiration.Event) error {
	deactivated, err := out.deactivated(ctx, e.Sender)
	switch {
	case err != nil:
		return fmt.Errorf("looking up the sender's account: %w", err)
	case deactivated:
		return &expiration.DropError{Reason: expiration.Deactivated}
	}
	return nil
}

// checkMember returns a *expiration.RefusedError if the sender is no longer joined.
func (out *CheckedOutbox) checkMember(ctx context.Context, e expiration.Event) error {
	err := out.checkSender(ctx, e)
	if dropped := (*expiration.DropError)(nil); errors.As(err, &dropped) && dropped.Reason == expiration.SenderGone {
		return &expiration.RefusedError{Code: http.StatusForbidden, Response: notJoined}
	}
	return err
}
