package roomserver

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

// backlog is what lies in the roomserver's queue for one room.
type backlog struct {
	// waiting messages have not been taken out. inWork is how many have been taken out and are not acknowledged.
	waiting, inWork uint64
	// taken counts all messages that were ever taken out; the first done of them are all acknowledged.
	taken, done uint64
}

// empty reports whether the roomserver has dealt with everything.
func (b backlog) empty() bool { return b.waiting == 0 && b.inWork == 0 }

// queues is what JetStream and the roomserver know of the roomserver's queues, one for each room.
type queues interface {
	// backlog returns what lies in the queue of a room.
	backlog(ctx context.Context, roomID string) (backlog, error)
	// wake gives the room an event that it has, which makes Dendrite start a worker for the room unless it has one.
	wake(ctx context.Context, roomID string) error
	// written returns how far the roomserver's output stream is, read how far our consumer has dealt with it.
	written(ctx context.Context) (uint64, error)
	read(ctx context.Context) (uint64, error)
}

// natsQueues asks the JetStream that Dendrite runs. A request takes a fraction of a millisecond.
type natsQueues struct {
	js     nats.JetStreamContext
	cfg    *config.JetStream
	inner  api.RoomserverInternalAPI
	server spec.ServerName
	reader string // the durable consumer of the output stream that stops timers
	// left has how many messages a crash left in work, by the names of the rooms' consumers. JetStream brings them again when that
	// takes too long for it: until then nobody works on them, and nobody can wait for them.
	left  map[string]int
	again time.Time // when it has brought them
}

// bringsAgainAfter is how long JetStream waits, see Dendrite's roomserver/internal/input.
const bringsAgainAfter = 5*time.Minute + 10*time.Second

// noteLeft notes what a crash left in work. It is called before the roomserver starts.
func (n *natsQueues) noteLeft(ctx context.Context) {
	n.left, n.again = map[string]int{}, time.Now().Add(bringsAgainAfter)
	for consumer := range n.js.Consumers(n.cfg.Prefixed(jetstream.InputRoomEvent), nats.Context(ctx)) {
		if consumer.NumAckPending > 0 {
			n.left[consumer.Name] = consumer.NumAckPending
		}
	}
}

func (n *natsQueues) backlog(ctx context.Context, roomID string) (backlog, error) {
	consumer := n.cfg.Prefixed("RoomInput" + jetstream.Tokenise(roomID))
	info, err := n.js.ConsumerInfo(n.cfg.Prefixed(jetstream.InputRoomEvent), consumer, nats.Context(ctx))
	if errors.Is(err, nats.ErrConsumerNotFound) { // nothing happened in the room for a day
		return backlog{}, nil
	} else if err != nil {
		return backlog{}, fmt.Errorf("looking into the roomserver's queue: %w", err)
	}
	b := backlog{
		waiting: info.NumPending, inWork: uint64(info.NumAckPending),
		taken: info.Delivered.Consumer, done: info.AckFloor.Consumer,
	}
	if left := n.left[consumer]; left > 0 && time.Now().Before(n.again) {
		b.inWork = uint64(max(info.NumAckPending-left, 0))
	}
	return b, nil
}

// wake gives the room its create event as an outlier: the roomserver ignores an outlier that it has.
func (n *natsQueues) wake(ctx context.Context, roomID string) error {
	tuple := gomatrixserverlib.StateKeyTuple{EventType: spec.MRoomCreate}
	var res api.QueryCurrentStateResponse
	if err := n.inner.QueryCurrentState(ctx, &api.QueryCurrentStateRequest{
		RoomID: roomID, StateTuples: []gomatrixserverlib.StateKeyTuple{tuple},
	}, &res); err != nil {
		return fmt.Errorf("looking up the create event: %w", err)
	}
	create := res.StateEvents[tuple]
	if create == nil {
		return nil
	}
	return api.SendEvents(ctx, n.inner, api.KindOutlier, []*types.HeaderedEvent{create}, n.server, n.server, n.server, nil, true)
}

func (n *natsQueues) written(ctx context.Context) (uint64, error) {
	info, err := n.js.StreamInfo(n.cfg.Prefixed(jetstream.OutputRoomEvent), nats.Context(ctx))
	if err != nil {
		return 0, fmt.Errorf("looking at the roomserver's output stream: %w", err)
	}
	return info.State.LastSeq, nil
}

func (n *natsQueues) read(ctx context.Context) (uint64, error) {
	info, err := n.js.ConsumerInfo(n.cfg.Prefixed(jetstream.OutputRoomEvent), n.reader, nats.Context(ctx))
	switch {
	case errors.Is(err, nats.ErrConsumerNotFound): // the first start: there is nothing to stop
		return ^uint64(0), nil
	case err != nil:
		return 0, fmt.Errorf("looking at the consumer of the roomserver's output stream: %w", err)
	case info.NumPending == 0 && info.NumAckPending == 0:
		return ^uint64(0), nil
	}
	return info.AckFloor.Stream, nil
}
