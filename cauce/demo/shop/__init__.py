"""The services of the demo, each written as a team would write it: `cauce run cauce.demo.shop`."""
