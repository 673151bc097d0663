package roomserver

import (
	"context"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Intake wraps Dendrite's roomserver and notes for which rooms events arrive. So an event that is due is built upon everything that arrived
// before it, see settled. Intake is the innermost wrapper, below the [API] and all others.
type Intake struct {
	api.RoomserverInternalAPI
	settled *settled
}

// NewIntake returns a wrapper. The queues are those of inner.
func NewIntake(inner api.RoomserverInternalAPI, q queues, o output) *Intake {
	return &Intake{RoomserverInternalAPI: inner, settled: newSettled(q, o, inner.QueryRoomVersionForRoom)}
}

// InputRoomEvents implements api.InputRoomEventsAPI.
func (i *Intake) InputRoomEvents(ctx context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	i.RoomserverInternalAPI.InputRoomEvents(ctx, req, res)
	for _, input := range req.InputRoomEvents {
		roomID := input.Event.RoomID().String()
		if req.Asynchronous { // a synchronous request waits until the roomserver has processed the event
			i.settled.forget(roomID)
		}
		if input.Event.Type() == spec.MRoomRedaction {
			i.settled.redacted(roomID)
		}
	}
}

// SetFederationAPI implements api.RoomserverInternalAPI.
func (i *Intake) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, keyRing *gomatrixserverlib.KeyRing) {
	i.RoomserverInternalAPI.SetFederationAPI(dendritefix.AdmitFetched(fsAPI, func(roomID, eventType string) {
		if eventType == spec.MRoomRedaction {
			i.settled.redacted(roomID)
		}
	}), keyRing)
}

// Settling returns a roomserver that waits until a room's queue is processed before it builds an event that is due there.
func (i *Intake) Settling(r expiration.Roomserver) expiration.Roomserver {
	return &settling{r, i.settled}
}
