package rtc

import (
	"context"
	"errors"
	"net/http"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// Delegations takes over leave events.
type Delegations interface {
	// DelegateLeave takes over a delayed leave event of a user. It returns nil when that is durable. The error is ErrNotScheduled, or passing.
	DelegateLeave(ctx context.Context, l Leave) error
}

// Leave is a delayed leave event that a user hands over, to be sent when its participant is gone from the SFU.
type Leave struct {
	UserID, RoomID string // of the event
	DelayID        string
	// MemberKey identifies the member of a slot whose leave it is.
	MemberKey [32]byte
	// Participant is the member at LiveKit.
	livekit.Participant
}

// TokenDelegations takes over the timers of expiring events.
type TokenDelegations interface {
	// DelegateToken takes over the timer of the token with this SHA-256. It returns nil when that is durable. participant returns who the
	// sender of the timer's event is at LiveKit, or an error, after which nothing is taken over. The error is ErrTooShort, that of participant,
	// or one that the caller of Tokens.DelegateToken knows, such as expiration.ErrNotFound.
	DelegateToken(ctx context.Context, token [32]byte, participant func(userID, roomID string) (livekit.Participant, error)) error
}

// delegateLeave hands over a leave event of a user of this server (MSC4195, delegate_delayed_leave). These requests have a limit of their own:
// a client that gets tokens for many SFUs must not be left with a leave event that is an hour away and that nobody sends earlier.
func (t *Tokens) delegateLeave(req *http.Request, device *userapi.Device) error {
	if err := webapi.MayRequest(t.leaves, device); err != nil {
		return err
	}
	body, err := webapi.ReadBody(req.Body)
	if err != nil {
		return err
	}
	f := matrixFields(body)
	url, m, delayID := f.text("url", maxSecret), f.member(device.UserID), f.name("delay_id")
	if f.err != nil {
		return f.err
	}
	ctx := req.Context()
	if err = t.checkJoined(ctx, m); err != nil {
		return err
	}
	if !t.isOurs(url) {
		return errNotOurs
	}
	return t.handOver(ctx, m, delayID, f.invalid)
}

// handOver hands over a leave event of a member whose user is joined. invalid makes the error for a delay ID that cannot be taken, for which
// MSC4195 and the service have different codes. Its text is the same whatever is wrong, so that it tells nothing of other users' events.
func (t *Tokens) handOver(ctx context.Context, m member, delayID string, invalid func(msg string) spec.MatrixError) error {
	if t.parts.Delegations == nil {
		return errors.New("leave events cannot be handed over")
	}
	err := t.parts.Delegations.DelegateLeave(ctx, Leave{
		UserID: m.userID, RoomID: m.roomID, DelayID: delayID, MemberKey: m.key(), Participant: m.participant(),
	})
	if errors.Is(err, ErrNotScheduled) {
		return webapi.BadRequest(invalid("delay_id is not that of a delayed event that is scheduled by this user in this room"))
	}
	return refusalOf(err)
}

// DelegateToken hands over the timer of an expiring event, whose token has this SHA-256. It returns nil when that is durable. The token is the
// authority: user and room are those of the event, so nobody can bind it to somebody else's connection. body is that of the request, and says
// which connection of this user it is. The error is a *webapi.RequestError, or that of TokenDelegations, which must be there.
func (t *Tokens) DelegateToken(ctx context.Context, token [32]byte, body []byte) error {
	f := matrixFields(body)
	m := member{id: f.optional("member_id"), deviceID: f.optional("device_id"), slotID: f.optional("slot_id")}
	switch {
	case m.id == "" && m.deviceID == "":
		f.fail(f.missing("member_id is missing, and device_id too"))
	case m.id == "": // as after /sfu/get, which knows one slot only
		m.slotID = callSlot
	default:
		m.slotID = f.name("slot_id")
	}
	url := t.cfg.URL
	if f.has("url") {
		url = f.text("url", maxSecret)
	}
	switch {
	case f.err != nil:
		return f.err
	case !t.isOurs(url):
		return errNotOurs
	}
	return refusalOf(t.parts.TokenDelegations.DelegateToken(ctx, token, func(userID, roomID string) (livekit.Participant, error) {
		// The limit of requests by token is one for each of the user's events. Each hand-over is a write, and a look at LiveKit.
		if err := webapi.Limited(t.leaves.Wait(userID, time.Now())); err != nil {
			return livekit.Participant{}, err
		}
		m := m
		m.userID, m.roomID = userID, roomID
		if m.id == "" {
			m.id, m.deviceID = userID+":"+m.deviceID, ""
		}
		if m.isAmbiguous() {
			return livekit.Participant{}, webapi.BadRequest(errMemberID)
		}
		return m.participant(), nil
	}))
}
