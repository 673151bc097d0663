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

// resetTimeout is how long the start waits for JetStream's answers.
const resetTimeout = time.Minute

// storedStreams are Dendrite's streams that outlive the process.
var storedStreams = []string{
	jetstream.InputRoomEvent, jetstream.InputDeviceListUpdate, jetstream.InputSigningKeyUpdate,
	jetstream.OutputRoomEvent, jetstream.OutputAppserviceEvent, jetstream.OutputSendToDeviceEvent,
	jetstream.OutputKeyChangeEvent, jetstream.OutputClientData, jetstream.OutputReceiptEvent,
	jetstream.OutputNotificationData,
}

// ResetStrandedConsumers lets those consumers of Dendrite's streams begin anew that are further than their stream is.
//
// A crash in the wrong moment makes JetStream forget the last sequence number of a stream that is empty, as Dendrite's
// mostly are. It counts from 1 again, and a durable consumer that was at 1000 gets none of the next 1000 messages: a room
// in which nobody can send, a server whose clients are told of nothing. JetStream logs that, and leaves it so.
//
// It must be called before anything is published: between its two steps no message is kept for the consumer. What it loses
// so is only what the consumer would not have got either.
func ResetStrandedConsumers(ctx context.Context, js nats.JetStreamContext, cfg *config.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, resetTimeout)
	defer cancel()
	for _, name := range storedStreams {
		stream := cfg.Prefixed(name)
		var consumers []*nats.ConsumerInfo
		for consumer := range js.Consumers(stream, nats.Context(ctx)) {
			consumers = append(consumers, consumer)
		}
		// Asked after its consumers, so that it is not behind them for that reason.
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
				continue // it was of the process that crashed
			}
			if _, err = js.AddConsumer(stream, &consumer.Config, nats.Context(ctx)); err != nil {
				return fmt.Errorf("failed to make the consumer %s of the stream %s: %w", consumer.Name, stream, err)
			}
		}
	}
	return nil
}
