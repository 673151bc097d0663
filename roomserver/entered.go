package roomserver

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"

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
func (c *Closer) entered(ctx context.Context, e expiration.Event, signed expiration.SignedEvent, thorough bool) error {
	if !thorough && c.checkSender(ctx, e) == nil {
		return nil // when a crash has set the room back, its forward extremities are misleading
	}
	in, err := c.isIn(ctx, e.RoomID, signed)
	if err != nil || in {
		return err
	}
	return c.checkRoom(ctx, e, &expiration.UnsendableError{Cause: errSoftFailed})
}

var errSoftFailed = errors.New("the state of the room changed while the event was built, and does not allow it any more")

// isIn reports whether an event is among a room's forward extremities or their nearest ancestors. A soft-failed event is not, because new
// events of the room do not refer to it.
func (c *Closer) isIn(ctx context.Context, roomID string, signed expiration.SignedEvent) (bool, error) {
	var latest api.QueryLatestEventsAndStateResponse
	if err := c.rsAPI.QueryLatestEventsAndState(ctx, &api.QueryLatestEventsAndStateRequest{
		RoomID: roomID, StateToFetch: []gomatrixserverlib.StateKeyTuple{{EventType: spec.MRoomCreate}}, // none would mean all
	}, &latest); err != nil {
		return false, fmt.Errorf("looking up the latest events of a room: %w", err)
	}
	depth := gjson.GetBytes(signed.PDU, "depth").Int()
	seen := map[string]bool{}
	extremities := true // in the first round; another server may have made up their depths
	for next := latest.LatestEvents; len(next) > 0; {
		var unseen []string
		for _, eventID := range next {
			if eventID == signed.EventID {
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
		if err := c.rsAPI.QueryEventsByID(ctx, &api.QueryEventsByIDRequest{RoomID: roomID, EventIDs: unseen}, &res); err != nil {
			return false, fmt.Errorf("looking up the latest events of a room: %w", err)
		}
		for _, event := range res.Events {
			if extremities || event.Depth() > depth {
				next = append(next, event.PrevEventIDs()...)
			}
		}
		extremities = false
	}
	return false, nil
}
