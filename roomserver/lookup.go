package roomserver

import (
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Replaced implements expiration.Roomserver.
func (out *Outbox) Replaced(ctx context.Context, e expiration.Event) (bool, error) {
	current, err := out.replaced(ctx, e)
	return current != nil, err
}

// replaced returns the current state if it has replaced the state event e, and otherwise nil.
func (out *Outbox) replaced(ctx context.Context, e expiration.Event) (gomatrixserverlib.PDU, error) {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: e.Type, StateKey: *e.StateKey}
	var res api.QueryCurrentStateResponse
	if err := out.rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: e.RoomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return nil, fmt.Errorf("looking up the current state: %w", err)
	}
	current := res.StateEvents[tuple]
	if current == nil || current.EventID() == e.ID {
		return nil, nil
	}
	// An event that the roomserver does not know yet may be in its queue, and may still become the current state.
	original, err := out.event(ctx, e.RoomID, e.ID)
	if err != nil || original == nil || !newer(current, original) {
		return nil, err
	}
	return current.PDU, nil
}

// original returns the event that is to be closed, or an *expiration.DropError if it was redacted.
func (out *Outbox) original(ctx context.Context, e expiration.Event) (gomatrixserverlib.PDU, error) {
	original, err := out.event(ctx, e.RoomID, e.ID)
	switch {
	case err != nil:
		return nil, err
	case original == nil:
		return nil, expiration.ErrUnknownEvent
	case !isRunning(original):
		return nil, &expiration.DropError{Reason: expiration.Redacted}
	}
	return original, nil
}

// checkSender returns a *expiration.DropError if the room is gone or the sender is not joined.
func (out *Outbox) checkSender(ctx context.Context, e expiration.Event) error {
	sender, err := spec.NewUserID(e.Sender, true)
	if err != nil {
		return err
	}
	var res api.QueryMembershipForUserResponse
	if err = out.rsAPI.QueryMembershipForUser(ctx, &api.QueryMembershipForUserRequest{
		RoomID: e.RoomID, UserID: *sender,
	}, &res); err != nil {
		return fmt.Errorf("looking up the membership of the sender: %w", err)
	}
	switch {
	case !res.RoomExists:
		return &expiration.DropError{Reason: expiration.RoomGone}
	case !res.IsInRoom:
		return &expiration.DropError{Reason: expiration.SenderGone}
	}
	return nil
}

// checkRoom returns a *expiration.DropError if an operation failed because the room or the sender is gone. Otherwise it returns the
// operation's own error.
func (out *Outbox) checkRoom(ctx context.Context, e expiration.Event, failed error) error {
	if err := out.checkSender(ctx, e); err != nil {
		return err
	}
	return failed
}

// event returns an event that the roomserver has, or nil.
func (out *Outbox) event(ctx context.Context, roomID, eventID string) (gomatrixserverlib.PDU, error) {
	var res api.QueryEventsByIDResponse
	if err := out.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{
		RoomID: roomID, EventIDs: []string{eventID},
	}, &res); err != nil {
		return nil, fmt.Errorf("looking up %s: %w", eventID, err)
	}
	if len(res.Events) == 0 {
		return nil, nil
	}
	return res.Events[0].PDU, nil
}
