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

// maxAncestors is how many events are looked through for one that may be in its room. What is built upon it within the
// moment since it was processed is far less.
const maxAncestors = 200

// entered returns nil if an event that the roomserver has processed without error came into its room. The roomserver soft-fails an
// event that its own room no longer allows, because the sender left or was kicked while it was built, and says nothing of it: nobody is ever
// shown the event. It does the same if its database fails while it looks, so the event may be given to it again. The error is a
// *expiration.DropError if the sender or the room is gone, and else an *expiration.UnsendableError.
func (c *Closer) entered(ctx context.Context, e expiration.Event, signed expiration.SignedEvent, thorough bool) error {
	if !thorough && c.checkSender(ctx, e) == nil {
		return nil // a room that a crash has set back does not show what it has
	}
	in, err := c.isIn(ctx, e.RoomID, signed)
	if err != nil || in {
		return err
	}
	return c.checkRoom(ctx, e, &expiration.UnsendableError{Cause: errSoftFailed})
}

var errSoftFailed = errors.New("the state of the room changed while the event was built, and does not allow it any more")

// isIn reports whether an event is among a room's forward extremities or their nearest ancestors: new events of the room refer to no
// event that was soft-failed.
func (c *Closer) isIn(ctx context.Context, roomID string, signed expiration.SignedEvent) (bool, error) {
	var latest api.QueryLatestEventsAndStateResponse
	if err := c.rsAPI.QueryLatestEventsAndState(ctx, &api.QueryLatestEventsAndStateRequest{
		RoomID: roomID, StateToFetch: []gomatrixserverlib.StateKeyTuple{{EventType: spec.MRoomCreate}}, // none would be all
	}, &latest); err != nil {
		return false, fmt.Errorf("looking up the latest events of a room: %w", err)
	}
	depth := gjson.GetBytes(signed.PDU, "depth").Int()
	seen := map[string]bool{}
	extremities := true // whose depth another server may have made up
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
		if len(seen) > maxAncestors { // a busy room; nobody is told that an event failed that may have come
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
