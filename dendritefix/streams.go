package dendritefix

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"
)

// resetTimeout bounds how long the start waits for answers of JetStream.
const resetTimeout = time.Minute

// storedStreams are Dendrite's streams that outlive the process.
var storedStreams = []string{
	jetstream.InputRoomEvent, jetstream.InputDeviceListUpdate, jetstream.InputSigningKeyUpdate,
	jetstream.OutputRoomEvent, jetstream.OutputAppserviceEvent, jetstream.OutputSendToDeviceEvent,
	jetstream.OutputKeyChangeEvent, jetstream.OutputClientData, jetstream.OutputReceiptEvent,
	jetstream.OutputNotificationData,
}

// ResetStrandedConsumers resets the consumers whose positions are beyond the ends of their streams.
//
// A crash at the wrong moment makes JetStream forget the last sequence number of an empty stream, and Dendrite's streams are mostly empty.
// The stream counts from 1 again. A durable consumer that was at 1000 then misses the next 1000 messages: all sends in a room fail, or
// clients are told of nothing. JetStream logs this and does not repair it.
//
// It must be called before anything is published: between the deletion of a consumer and its new creation, JetStream keeps no message for
// it. The consumer would have missed those messages in any case.
//
// This file can go when JetStream keeps the last sequence number of an empty stream across a crash, in the version that Dendrite uses.
func ResetStrandedConsumers(ctx context.Context, js nats.JetStreamContext, cfg *config.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, resetTimeout)
	defer cancel()
	for _, name := range storedStreams {
		stream := cfg.Prefixed(name)
		var consumers []*nats.ConsumerInfo
		for consumer := range js.Consumers(stream, nats.Context(ctx)) {
			consumers = append(consumers, consumer)
		}
		// Queried after the consumers: an older answer could be behind them without a fault.
		info, err := js.StreamInfo(stream, nats.Context(ctx))
		if errors.Is(err, nats.ErrStreamNotFound) {
			continue
		} else if err != nil {
			return fmt.Errorf("failed to look at the stream %s: %w", stream, err)
		}
		for _, consumer := range consumers {
			if consumer.Delivered.Stream <= info.State.LastSeq {
				continue
			}
			logrus.WithFields(logrus.Fields{
				"stream": stream, "consumer": consumer.Name, "at": consumer.Delivered.Stream, "last": info.State.LastSeq,
			}).Warn("JetStream forgot a stream's last sequence number, the consumer begins anew")
			if err = js.DeleteConsumer(stream, consumer.Name, nats.Context(ctx)); err != nil {
				return fmt.Errorf("failed to delete the consumer %s of the stream %s: %w", consumer.Name, stream, err)
			}
			if consumer.Config.Durable == "" {
				continue // an ephemeral consumer, of the process that crashed
			}
			if _, err = js.AddConsumer(stream, &consumer.Config, nats.Context(ctx)); err != nil {
				return fmt.Errorf("failed to make the consumer %s of the stream %s: %w", consumer.Name, stream, err)
			}
		}
	}
	return nil
}
