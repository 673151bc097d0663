package expiration

import "time"

// RateLimit allows Threshold requests at once, and as many again in each Cooloff. The zero value allows all.
type RateLimit struct {
	Threshold int
	Cooloff   time.Duration
}

// Bucket is what is remembered of requests that are limited together: when it will be as if there had been none. However many come
// at once, and in whatever order their times are, no more are allowed than the limit says, and those that are refused cost nothing.
type Bucket time.Duration

// Take returns 0 if a request is allowed now, and else after how long one will be. The time is counted from some moment before the
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
