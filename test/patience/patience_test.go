package patience

import (
	"testing"
	"time"
)

// Limits grow with the factor. They are never shorter than on an idle machine, and they are bounded.
func TestFactor(t *testing.T) {
	defer func(measured func() float64) { factor = measured }(factor)
	for _, test := range []struct {
		factor float64
		limit  time.Duration
		life   int
	}{{1, time.Minute, 5}, {1.1, 66 * time.Second, 6}, {3, 3 * time.Minute, 15}, {1000, 20 * time.Minute, 20}} {
		factor = func() float64 { return test.factor }
		if limit, life := For(time.Minute), Life(5); limit != test.limit || life != test.life {
			t.Errorf("by a factor of %v, a minute is %s, and 5 seconds %d", test.factor, limit, life)
		}
	}
}

func TestMeasure(t *testing.T) {
	if f := factor(); f < 1 {
		t.Errorf("the factor is %v", f)
	}
	t.Logf("this machine is slower than the usual one by a factor of %.2f", factor())
}
