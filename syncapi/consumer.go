// Package syncapi reads the roomserver's output stream, and stops the timers of events that were replaced or redacted, or whose
// senders have left. It also tells the call backend who has left.
//
// The consumer is durable: it receives every event of every room at least once, in the order of the room, also across restarts. A message
// arrives a moment after the event is in the room. This delays only the moment when a token becomes invalid. Before a closing event is
// built, everything is checked again.
package syncapi

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/jetstream"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/nats-io/nats.go"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const (
	// batch is how many messages are read at once.
	batch = 64
	// forgetAfter is how long the stream keeps messages for an absent consumer. Without this limit, a server that goes back to stock
	// Dendrite would keep them forever.
	forgetAfter = 24 * time.Hour
	// redeliverAfter is how long after a crash an unacknowledged message is redelivered. Until then, an event that was replaced just
	// before the crash can still count as running.
	redeliverAfter = 5 * time.Second
	// pause is the pause before failed messages are read again.
	pause = time.Second
)

// Timers is the part of the engine that the consumer tells of changes.
type Timers interface {
	StateRemoved(ctx context.Context, eventID string) error
	StateChanged(ctx context.Context, s expiration.StateKey, eventID string) error
	DropEvent(ctx context.Context, eventID string, reason expiration.DropReason)
	DropSender(ctx context.Context, roomID, userID string, before time.Time)
	CancelState(ctx context.Context, s expiration.StateKey, owner string, before time.Time) error
	DropRoom(ctx context.Context, roomID string)
	RoomChanged(ctx context.Context, roomID string) error
	DeleteStopped(ctx context.Context) error
}

// Members is told who has left a room.
type Members interface {
	// MemberLeft is called for users of all servers, perhaps late, twice, or after the user has joined again. Its effect is durable when it
	// returns nil.
	MemberLeft(ctx context.Context, roomID, userID string) error
}

// Roomserver is the part of the roomserver that the consumer queries.
type Roomserver interface {
	QueryUserIDForSender(ctx context.Context, roomID spec.RoomID, senderID spec.SenderID) (*spec.UserID, error)
	dendritefix.RedactionRoomserver
}

// Consumer reads the output stream.
type Consumer struct {
	jetstream nats.JetStreamContext
	durable   string
	topic     string
	rsAPI     Roomserver
	timers    Timers
	members   Members // may be nil
	levels    *dendritefix.PowerLevels
}

// consumer is the name of the durable consumer. Dendrite adds pullSuffix to it.
const consumer, pullSuffix = "ExpirationTimers", "Pull"

// ConsumerName returns the full name that JetStream knows the consumer by.
func ConsumerName(cfg *config.JetStream) string { return cfg.Durable(consumer) + pullSuffix }

// NewConsumer returns a consumer that does nothing before Start. members may be nil.
func NewConsumer(cfg *config.JetStream, js nats.JetStreamContext, rsAPI Roomserver, timers Timers, members Members) *Consumer {
	return &Consumer{
		jetstream: js,
		durable:   cfg.Durable(consumer),
		topic:     cfg.Prefixed(jetstream.OutputRoomEvent),
		rsAPI:     rsAPI,
		timers:    timers,
		members:   members,
		levels:    dendritefix.NewPowerLevels(rsAPI.QueryCurrentState),
	}
}

// Start starts the goroutine that reads the stream, until ctx is done.
func (c *Consumer) Start(ctx context.Context) error {
	return jetstream.JetStreamConsumer(
		ctx, c.jetstream, c.topic, c.durable, batch, c.onMessages,
		nats.DeliverAll(), nats.ManualAck(), nats.InactiveThreshold(forgetAfter), nats.AckWait(redeliverAfter),
	)
}

// onMessages acknowledges messages after their effects are written: a stopped timer must not come back after a crash.
func (c *Consumer) onMessages(ctx context.Context, msgs []*nats.Msg) bool {
	failpoint.Pass(failpoint.Stream)
	var failed error
	for _, msg := range msgs {
		switch api.OutputType(msg.Header.Get(jetstream.RoomEventType)) {
		case api.OutputTypeNewRoomEvent, api.OutputTypeRedactedEvent, api.OutputTypePurgeRoom:
			var output api.OutputEvent
			if err := json.Unmarshal(msg.Data, &output); err != nil {
				logrus.WithError(err).Error("expiration consumer: message parse failure")
				continue
			}
			// A message whose handling panics is skipped. That is safe, because everything is checked again before an event is sent.
			guard.Run("reading the roomserver's output", func() {
				failed = errors.Join(failed, c.onOutput(ctx, &output, sentAt(msg)))
			})
		}
	}
	if err := errors.Join(failed, c.timers.DeleteStopped(ctx)); err != nil {
		logrus.WithError(err).Warn("expiration consumer: cannot go on for the moment")
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		return false
	}
	return true
}

// sentAt returns when the roomserver put a message into the stream.
func sentAt(msg *nats.Msg) time.Time {
	if metadata, err := msg.Metadata(); err == nil {
		return metadata.Timestamp
	}
	return time.Now()
}

func (c *Consumer) onOutput(ctx context.Context, output *api.OutputEvent, sent time.Time) error {
	switch {
	case output.NewRoomEvent != nil:
		return c.onNewRoomEvent(ctx, output.NewRoomEvent, sent)
	case output.RedactedEvent != nil:
		c.timers.DropEvent(ctx, output.RedactedEvent.RedactedEventID, expiration.Redacted)
	case output.PurgeRoom != nil:
		c.timers.DropRoom(ctx, output.PurgeRoom.RoomID)
	}
	return nil
}

func (c *Consumer) onNewRoomEvent(ctx context.Context, output *api.OutputNewRoomEvent, sent time.Time) (failed error) {
	for _, eventID := range output.RemovesStateEventIDs {
		failed = errors.Join(failed, c.timers.StateRemoved(ctx, eventID))
	}
	event := output.Event
	if key := event.StateKey(); key != nil { // there may be delayed events for it
		failed = errors.Join(failed, c.timers.StateChanged(ctx, expiration.StateKey{
			RoomID: event.RoomID().String(), Type: event.Type(), Key: *key,
		}, event.EventID()))
	}
	if output.RewritesState {
		failed = errors.Join(failed, c.timers.RoomChanged(ctx, event.RoomID().String()))
	}
	redacted, err := dendritefix.UnseenRedaction(ctx, c.rsAPI, event.PDU)
	if redacted != "" { // a closing event would publish the deleted content again
		c.timers.DropEvent(ctx, redacted, expiration.Redacted)
	}
	failed = errors.Join(failed, err)
	c.levels.Watch(ctx, output)
	if event.Type() != spec.MRoomMember || event.StateKey() == nil {
		return failed
	}
	if membership, err := event.Membership(); err != nil || membership == spec.Join {
		return failed
	}
	userID, err := c.rsAPI.QueryUserIDForSender(ctx, event.RoomID(), spec.SenderID(*event.StateKey()))
	if err != nil || userID == nil {
		logrus.WithError(err).WithField("event_id", event.EventID()).Error("expiration consumer: unknown member")
		return failed
	}
	// Only events from before the message are dropped: it may arrive late, or again, after the user has rejoined.
	c.timers.DropSender(ctx, event.RoomID().String(), userID.String(), sent)
	if c.members != nil {
		failed = errors.Join(failed, c.members.MemberLeft(ctx, event.RoomID().String(), userID.String()))
	}
	return errors.Join(failed, c.cancelMembership(ctx, event, userID.String(), sent))
}

// cancelMembership cancels the events about the user's own membership that the user scheduled before leaving the room. A delayed join must
// not undo the leave. The user's membership events about others stay, because the user may be back in the room when they are due.
func (c *Consumer) cancelMembership(ctx context.Context, event *types.HeaderedEvent, userID string, sent time.Time) (failed error) {
	// In rooms with pseudo IDs, a client may use either the user ID or the pseudo ID as the state key.
	for _, key := range slices.Compact([]string{userID, *event.StateKey()}) {
		failed = errors.Join(failed, c.timers.CancelState(ctx, expiration.StateKey{
			RoomID: event.RoomID().String(), Type: spec.MRoomMember, Key: key,
		}, userID, sent))
	}
	return failed
}
