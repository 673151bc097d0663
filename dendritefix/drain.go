package dendritefix

import (
	"context"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/nats-io/nats.go"
)

// Drain waits until the consumers of the room streams have processed everything, or ctx is done. A server that stops calls it after its
// last request and before it shuts Dendrite down. The next start processes the rest.
//
// Dendrite stops all of its components at once. A consumer that writes in that moment finds its database closed, and panics.
//
// This file can go when Dendrite's consumers end before their databases are closed.
func Drain(ctx context.Context, js nats.JetStreamContext, cfg *config.JetStream) {
	for _, stream := range []string{jetstream.InputRoomEvent, jetstream.OutputRoomEvent} {
		for !idle(ctx, js, cfg.Prefixed(stream)) && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// idle reports whether no consumer of a stream has anything to do.
func idle(ctx context.Context, js nats.JetStreamContext, stream string) bool {
	for consumer := range js.Consumers(stream, nats.Context(ctx)) {
		if consumer.NumPending > 0 || consumer.NumAckPending > 0 {
			return false
		}
	}
	return true
}
