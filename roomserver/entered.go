package roomserver

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// maxAncestors is how many events isIn searches. Far fewer are built upon an event in the moment after it was processed.
const maxAncestors = 200

// entered returns nil if an event that the roomserver has processed without error is in its room.
//
// The roomserver soft-fails an event that the current state no longer allows, for example because the sender left while the event was
// built. It reports no error, but no client ever sees the event. It also soft-fails an event if its database fails during that check, so
// the event may be given to it again. The error is a *expiration.DropError if the sender or the room is gone, and otherwise a
// *expiration.UnsendableError.
//
// Unless thorough is set, an event that the current state allows counts as in its room. When a crash has set the room back, its forward
// extremities are misleading.
func (out *Outbox) entered(ctx context.Context, e expiration.Event, signed expiration.SignedEvent, thorough bool) error {
	pdu, err := readBuilt(signed)
	if err != nil {
		return err
	}
	var now api.QueryLatestEventsAndStateResponse
	if err = out.rsAPI.QueryLatestEventsAndState(ctx, &api.QueryLatestEventsAndStateRequest{
		RoomID: e.RoomID, StateToFetch: gomatrixserverlib.StateNeededForAuth([]gomatrixserverlib.PDU{pdu}).Tuples(),
	}, &now); err != nil {
		return fmt.Errorf("looking up the latest events of a room: %w", err)
	}
	if !thorough && out.allows(ctx, now.StateEvents, pdu) {
		return nil
	}
	in, err := out.isIn(ctx, e.RoomID, now.LatestEvents, pdu)
	if err != nil || in {
		return err
	}
	return out.checkRoom(ctx, e, &expiration.UnsendableError{Cause: errSoftFailed})
}

var errSoftFailed = errors.New("the state of the room changed while the event was built, and does not allow it any more")

// allows reports whether a room's state allows an event.
func (out *Outbox) allows(ctx context.Context, state []*types.HeaderedEvent, pdu gomatrixserverlib.PDU) bool {
	provider := authEvents(gomatrixserverlib.NewAuthEvents(gomatrixserverlib.ToPDUs(state)))
	return provider != nil && gomatrixserverlib.Allowed(pdu, provider, func(roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error) {
		return out.rsAPI.QueryUserIDForSender(ctx, roomID, senderID)
	}) == nil
}

// authEvents returns the result of NewAuthEvents in either form: the maintained line of Dendrite has a newer gomatrixserverlib, in which it
// is a pointer and an error. The result is nil after an error.
func authEvents(auth any, errs ...error) gomatrixserverlib.AuthEventProvider {
	for _, err := range errs {
		if err != nil {
			return nil
		}
	}
	if older, ok := auth.(gomatrixserverlib.AuthEvents); ok {
		return &older
	}
	provider, _ := auth.(gomatrixserverlib.AuthEventProvider)
	return provider
}

// isIn reports whether an event is among a room's forward extremities or their nearest ancestors. A soft-failed event is not, because new
// events of the room do not refer to it.
func (out *Outbox) isIn(ctx context.Context, roomID string, latest []string, pdu gomatrixserverlib.PDU) (bool, error) {
	seen := map[string]bool{}
	extremities := true // in the first round; another server may have made up their depths
	for next := latest; len(next) > 0; {
		var unseen []string
		for _, eventID := range next {
			if eventID == pdu.EventID() {
				return true, nil
			}
			if !seen[eventID] {
				seen[eventID] = true
				unseen = append(unseen, eventID)
			}
		}
		if len(seen) > maxAncestors { // a busy room: success is reported, because a failure might be wrong
			return true, nil
		}
		next = nil
		var res api.QueryEventsByIDResponse
		if err := out.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{RoomID: roomID, EventIDs: unseen}, &res); err != nil {
			return false, fmt.Errorf("looking up the latest events of a room: %w", err)
		}
		for _, event := range res.Events {
			if extremities || event.Depth() > pdu.Depth() {
				next = append(next, event.PrevEventIDs()...)
			}
		}
		extremities = false
	}
	return false, nil
}
