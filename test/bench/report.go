package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// report has the results.
type report struct {
	results []result
	plots   string // a folder, or "" for none
}

// result is one line of the table.
type result struct {
	Database string  `json:"database"`
	What     string  `json:"what"`
	Goal     string  `json:"goal"`
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
	// Spread is the smallest and the greatest value of all rounds.
	Spread [2]float64 `json:"spread"`
}

// markdown returns the results as a table.
func (r *report) markdown() string {
	var b strings.Builder
	b.WriteString("| database | what | goal | median | least … greatest |\n| --- | --- | --- | ---: | ---: |\n")
	for _, r := range r.results {
		fmt.Fprintf(&b, "| %s | %s | %s | %.3g%s | %.3g … %.3g |\n", r.Database, r.What, r.Goal, r.Value, r.Unit, r.Spread[0], r.Spread[1])
	}
	return b.String()
}

func (r *report) writeJSON(name string) error {
	data, err := json.MarshalIndent(r.results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(data, '\n'), 0o644)
}

// drawing is a plot of lines.
type drawing struct {
	title, x, y string
	lines       []line
	points      bool // marks the points
}

// line is one line of a drawing.
type line struct {
	name   string
	points plotter.XYs
}

// draw writes a drawing as SVG, if the user asks for plots.
func (r *report) draw(database, name string, d drawing) error {
	if r.plots == "" {
		return nil
	}
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = d.title, d.x, d.y
	p.Title.Padding = vg.Points(8)
	p.Add(plotter.NewGrid())
	add, lines := plotutil.AddLines, make([]any, 0, 2*len(d.lines))
	for _, l := range d.lines {
		lines = append(lines, l.name, l.points)
	}
	if d.points {
		add = plotutil.AddLinePoints
	}
	if err := add(p, lines...); err != nil {
		return err
	}
	p.X.Min, p.Y.Min = 0, 0
	if d.y != percent {
		// The legend has room above the lines. Lines of shares leave room for it below.
		p.Legend.Top = true
		p.Y.Max *= 1.3
	}
	if err := os.MkdirAll(r.plots, 0o755); err != nil {
		return err
	}
	return p.Save(16*vg.Centimeter, 10*vg.Centimeter, filepath.Join(r.plots, strings.ToLower(database)+"-"+name+".svg"))
}

// percent is the label of an axis with shares.
const percent = "share of all (%)"

// shares returns the line that shows, for each duration, how many percent of all took at most that long. It leaves out the slowest
// hundredth, which would squeeze the rest.
func shares(name string, times []time.Duration) line {
	times = slices.Sorted(slices.Values(times))
	l := line{name: name}
	for i := range 100 {
		l.points = append(l.points, plotter.XY{X: milliseconds(quantile(times, float64(i)/100)), Y: float64(i)})
	}
	return l
}

// thinned returns at most n of the points, evenly spaced. More points cannot be seen.
func thinned(points plotter.XYs, n int) (some plotter.XYs) {
	for i := 0; i < len(points); i += (len(points)-1)/n + 1 {
		some = append(some, points[i])
	}
	return some
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the given quantile of sorted durations.
func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// median returns the median of durations, which need not be sorted.
func median(times []time.Duration) time.Duration {
	return quantile(slices.Sorted(slices.Values(times)), .5)
}
