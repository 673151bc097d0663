package clientapi

import "context"

// methodDelegate is the method that hands an event's timer over to the SFU. Only a server with a Delegator has it. Without it the path is
// answered as that of any other word, and so clients find out.
const methodDelegate = "delegate"

// Delegator has an SFU keep the timers of expiring events alive in place of the client.
type Delegator interface {
	// DelegateToken hands over the timer of the token with this hash. It returns nil when that is durable. body is that of the request: its
	// other fields say as whom the sender of the event is connected to the SFU. The error is a *webapi.RequestError, expiration.ErrNotFound
	// if no such timer runs, or a passing fault.
	DelegateToken(ctx context.Context, token [32]byte, body []byte) error
}
