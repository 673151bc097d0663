package roomserver

import (
	"context"

	fsapi "github.com/matrix-org/dendrite/federationapi/api"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/nats-io/nats.go"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// Queue is Dendrite's roomserver, and what lies in its queues. It stands between the roomserver and the [API], so that it sees
// whatever comes in. It guarantees that nothing lies there unseen, see quiet, and that what is sent when it is due is built
// upon what has come before, see settled.
type Queue struct {
	api.RoomserverInternalAPI
	*quiet
	settled *settled
}

// NewQueue returns a roomserver that looks after its queues from Start on. It is called before inner works on any. The durable
// consumer of the roomserver's output stream is the one that stops timers, by its full name.
func NewQueue(
	ctx context.Context, inner api.RoomserverInternalAPI, js nats.JetStreamContext, cfg *config.JetStream, server spec.ServerName, consumer string,
) *Queue {
	q := &natsQueues{js: js, cfg: cfg, inner: inner, server: server, reader: consumer}
	q.noteLeft(ctx)
	return &Queue{RoomserverInternalAPI: inner, quiet: newQuiet(q), settled: newSettled(q, inner)}
}

// InputRoomEvents implements api.InputRoomEventsAPI.
func (q *Queue) InputRoomEvents(ctx context.Context, req *api.InputRoomEventsRequest, res *api.InputRoomEventsResponse) {
	q.RoomserverInternalAPI.InputRoomEvents(ctx, req, res)
	for i := range req.InputRoomEvents {
		e := req.InputRoomEvents[i].Event
		if !req.Asynchronous && e.Type() != spec.MRoomRedaction {
			continue // the sender waits until the roomserver is done with it
		}
		roomID := e.RoomID().String()
		q.settled.forget(roomID)
		if e.Type() == spec.MRoomRedaction {
			q.settled.redacted(roomID)
		}
		if req.Asynchronous {
			q.came(roomID)
		}
	}
}

// SetFederationAPI implements api.RoomserverInternalAPI.
func (q *Queue) SetFederationAPI(fsAPI fsapi.RoomserverFederationAPI, keyRing *gomatrixserverlib.KeyRing) {
	q.RoomserverInternalAPI.SetFederationAPI(dendritefix.AdmitFetched(fsAPI, func(roomID, eventType string) {
		if eventType == spec.MRoomRedaction {
			q.settled.redacted(roomID)
		}
	}), keyRing)
}

// PerformLeave implements api.ClientRoomserverAPI. The roomserver gives itself the event, and waits until it is dealt with.
func (q *Queue) PerformLeave(ctx context.Context, req *api.PerformLeaveRequest, res *api.PerformLeaveResponse) error {
	q.came(req.RoomID)
	return q.RoomserverInternalAPI.PerformLeave(ctx, req, res)
}

// PerformInvite implements api.ClientRoomserverAPI. The roomserver gives itself the event, and waits until it is dealt with.
func (q *Queue) PerformInvite(ctx context.Context, req *api.PerformInviteRequest) error {
	q.came(req.InviteInput.RoomID.String())
	return q.RoomserverInternalAPI.PerformInvite(ctx, req)
}

// Settling returns a roomserver that deals with what lies in a room's queue before it builds an event that is due there.
func (q *Queue) Settling(r expiration.Roomserver) expiration.Roomserver {
	return &settling{r, q.settled}
}
