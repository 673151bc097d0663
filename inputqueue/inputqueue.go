// Package inputqueue looks into the queues of Dendrite's roomserver, one for each room, and wakes the workers that read them.
package inputqueue

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/nats-io/nats.go"
)

// Backlog counts the messages in the queue of one room.
type Backlog struct {
	// Waiting is how many messages no worker has taken out yet. InWork is how many have been taken out and are not acknowledged.
	Waiting, InWork uint64
	// Taken counts all messages that were ever taken out. The first Done of them are all acknowledged.
	Taken, Done uint64
}

// Empty reports whether the roomserver has processed everything in the queue.
func (b Backlog) Empty() bool { return b.Waiting == 0 && b.InWork == 0 }

// Roomserver is the part of the roomserver that is needed to wake a worker.
type Roomserver interface {
	api.InputRoomEventsAPI
	QueryCurrentState(ctx context.Context, req *api.QueryCurrentStateRequest, res *api.QueryCurrentStateResponse) error
}

// Queues reads the state of the queues from Dendrite's embedded JetStream. A query takes a fraction of a millisecond.
type Queues struct {
	js     nats.JetStreamContext
	cfg    *config.JetStream
	rsAPI  Roomserver
	server spec.ServerName
	// inWorkBefore counts the messages that were in work when the previous process ended, by the name of the room's consumer. Until
	// redeliveredAt no worker has them, so waiting for them is pointless.
	inWorkBefore map[string]int
	// redeliveredAt is when JetStream redelivers them.
	redeliveredAt time.Time
}

// redelivery is the time after which JetStream redelivers a message, see Dendrite's roomserver/internal/input.
const redelivery = 5*time.Minute + 10*time.Second

// New returns the queues of a roomserver. It must be called before the roomserver takes anything out of them.
func New(ctx context.Context, js nats.JetStreamContext, cfg *config.JetStream, rsAPI Roomserver, server spec.ServerName) *Queues {
	q := &Queues{js: js, cfg: cfg, rsAPI: rsAPI, server: server}
	q.noteInWork(ctx)
	return q
}

// noteInWork notes how many messages were in work when the previous process ended.
func (q *Queues) noteInWork(ctx context.Context) {
	q.inWorkBefore, q.redeliveredAt = map[string]int{}, time.Now().Add(redelivery)
	for consumer := range q.js.Consumers(q.cfg.Prefixed(jetstream.InputRoomEvent), nats.Context(ctx)) {
		if consumer.NumAckPending > 0 {
			q.inWorkBefore[consumer.Name] = consumer.NumAckPending
		}
	}
}

// Backlog returns the backlog of a room.
func (q *Queues) Backlog(ctx context.Context, roomID string) (Backlog, error) {
	consumer := q.cfg.Prefixed("RoomInput" + jetstream.Tokenise(roomID))
	info, err := q.js.ConsumerInfo(q.cfg.Prefixed(jetstream.InputRoomEvent), consumer, nats.Context(ctx))
	if errors.Is(err, nats.ErrConsumerNotFound) { // no event for a day: JetStream has deleted the consumer
		return Backlog{}, nil
	} else if err != nil {
		return Backlog{}, fmt.Errorf("looking into the roomserver's queue: %w", err)
	}
	b := Backlog{
		Waiting: info.NumPending, InWork: uint64(info.NumAckPending),
		Taken: info.Delivered.Consumer, Done: info.AckFloor.Consumer,
	}
	if before := q.inWorkBefore[consumer]; before > 0 && time.Now().Before(q.redeliveredAt) {
		b.InWork = uint64(max(info.NumAckPending-before, 0))
	}
	return b, nil
}

// Wake makes Dendrite start a worker for a room, unless the room has one.
func (q *Queues) Wake(ctx context.Context, roomID string) error {
	return Wake(ctx, q.rsAPI, q.server, roomID)
}

// Wake makes Dendrite start a worker for a room, unless the room has one. It gives the room its own create event as an outlier, because the
// roomserver ignores an outlier that it has. An unknown room is left alone.
func Wake(ctx context.Context, rsAPI Roomserver, server spec.ServerName, roomID string) error {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomCreate}
	var res api.QueryCurrentStateResponse
	if err := rsAPI.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: roomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return fmt.Errorf("looking up the create event: %w", err)
	}
	create := res.StateEvents[tuple]
	if create == nil {
		return nil
	}
	return api.SendEvents(ctx, rsAPI, api.KindOutlier, []*types.HeaderedEvent{create}, server, server, server, nil, true)
}
