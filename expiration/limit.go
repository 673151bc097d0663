package expiration

import "time"

// RateLimit allows a burst of Threshold requests, and Threshold further requests per Cooloff. The zero value allows all.
type RateLimit struct {
	Threshold int
	Cooloff   time.Duration
}

// Bucket is the state of a rate limit: the time at which it is full again. The limit holds for concurrent requests, also if their times are
// out of order. A refused request costs nothing.
type Bucket time.Duration

// Take returns 0 if a request is allowed now, and otherwise how long to wait until one is. now counts from any fixed moment before the
// first request.
func (b *Bucket) Take(l RateLimit, now time.Duration) (wait time.Duration) {
	if l.Threshold == 0 {
		return 0
	}
	after := max(time.Duration(*b), now) + l.Cooloff/time.Duration(l.Threshold)
	if wait = after - l.Cooloff - now; wait > 0 {
		return wait
	}
	*b = Bucket(after)
	return 0
}

// Return undoes a Take that allowed a request, because the request was not carried out.
func (b *Bucket) Return(l RateLimit) {
	if l.Threshold > 0 {
		*b -= Bucket(l.Cooloff / time.Duration(l.Threshold))
	}
}
