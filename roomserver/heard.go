package roomserver

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/nats-io/nats.go"
)

// Output is the roomserver's output stream, and the consumer of it that stops timers.
type Output struct {
	js       nats.JetStreamContext
	cfg      *config.JetStream
	consumer string
}

// NewOutput returns the output stream. The consumer is given by its full name.
func NewOutput(js nats.JetStreamContext, cfg *config.JetStream, consumer string) *Output {
	return &Output{js: js, cfg: cfg, consumer: consumer}
}

// written returns the sequence number of the last message in the stream.
func (o *Output) written(ctx context.Context) (uint64, error) {
	info, err := o.js.StreamInfo(o.cfg.Prefixed(jetstream.OutputRoomEvent), nats.Context(ctx))
	if err != nil {
		return 0, fmt.Errorf("looking at the roomserver's output stream: %w", err)
	}
	return info.State.LastSeq, nil
}

// heard returns the sequence number up to which the consumer has acknowledged everything. It is the greatest number if the consumer has no
// messages left.
func (o *Output) heard(ctx context.Context) (uint64, error) {
	info, err := o.js.ConsumerInfo(o.cfg.Prefixed(jetstream.OutputRoomEvent), o.consumer, nats.Context(ctx))
	switch {
	case errors.Is(err, nats.ErrConsumerNotFound): // the first start: no timers are running
		return ^uint64(0), nil
	case err != nil:
		return 0, fmt.Errorf("looking at the consumer of the roomserver's output stream: %w", err)
	case info.NumPending == 0 && info.NumAckPending == 0:
		return ^uint64(0), nil
	}
	return info.AckFloor.Stream, nil
}
